"""The tests' process: asks the candidate's process for results, and judges them here, out of the candidate's reach."""

import builtins
import os
import sys

from . import wire

FILENAME = "<tests>"
SHOWN = 200  # characters of detail


class CandidateGone(BaseException):
    """The candidate ended or left its part; not an Exception, so that no test can mistake it for an answer."""


class NotPlainData(BaseException):
    """The tests pass on what only means something within one process."""


class Remote:
    """Something in the candidate's process that is not plain data. Equal to itself and to nothing else."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask, number):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **kwargs):
        """Call it over there."""
        return self._ask(("call", self, args, kwargs))

    def __iter__(self):
        """Over what list() of it is over there."""
        return iter(self._ask(("list", self)))

    def __len__(self):
        return self._ask(("length", self))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask(("get", self, name))

    def __setattr__(self, name, value):
        self._ask(("set", self, name, value))


class Candidate:
    """The other process, through a pipe in each direction."""

    def __init__(self, read_fd: int, write_fd: int, most: int):
        self.read_fd, self.write_fd, self.most = read_fd, write_fd, most
        self.remotes: dict[int, Remote] = {}

    def remote(self, number: int) -> Remote:
        """What stands here for an object over there, the same each time."""
        return self.remotes.setdefault(number, Remote(self.ask, number))

    def number(self, value) -> int:
        """The number of what stands for an object over there.

        Raises:
            NotPlainData: It does not: a function or an object of the tests.
        """
        if type(value) is not Remote:
            raise NotPlainData(type(value).__name__)
        return value._number

    def send(self, data: bytes) -> None:
        """Write to the other process.

        Raises:
            CandidateGone: It no longer reads.
        """
        try:
            wire.send(self.write_fd, data)
        except OSError:
            raise CandidateGone(self.farewell()) from None

    def ask(self, question):
        """The answer to a question.

        Raises:
            CandidateGone: The process has ended, or what it sends is no answer.
            Exception: A built-in one, where the answer is one.
        """
        self.send(wire.encode(question, self.number))
        return self.answer()

    def answer(self):
        """Wait for an answer; see `ask`."""
        try:
            answer = wire.decode(wire.receive(self.read_fd, self.most), self.remote)
        except EOFError:
            raise CandidateGone(self.farewell()) from None
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise CandidateGone(f"the result cannot be read: {error}") from None
        kinds = [type(part) for part in answer] if type(answer) is tuple else []
        if len(kinds) == 2 and answer[0] is True:
            return answer[1]
        if kinds != [bool, str, str]:
            raise CandidateGone("the program sent something that is no result")
        name, message = answer[1:]
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(message)
            except TypeError:  # UnicodeDecodeError and the like want more than a message
                error = RuntimeError(f"{name}: {message}")
            raise error
        raise CandidateGone(f"{name}: {message}" if message else name)

    def farewell(self) -> str:
        """How the process ended."""
        return ending(os.waitpid(-1, 0)[1])


def ending(status: int) -> str:
    """A process's wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    where = f"exit status {code}" if code >= 0 else f"signal {-code}"
    return f"the program ended with {where} before its tests did"


def names_in(code) -> set[str]:
    """All global names that compiled code may read, in the functions within it too."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            found |= names_in(constant)
    return found


def names_for_tests(candidate: Candidate, wanted: set[str], entry_point: str) -> dict:
    """What the tests see of the candidate's names: calls, plain values, and modules of the standard library of ours.

    A built-in's name means the built-in, whatever the candidate calls so, unless that is what is tested.
    """
    names = {}
    asked = sorted(name for name in wanted if not hasattr(builtins, name))
    found = candidate.ask(("names", asked))
    if type(found) is not dict:
        raise CandidateGone("the program sent something that is no result")
    for name in asked:
        kind, value = found.get(name, (None, None))
        if kind == "":
            names[name] = value
        elif type(kind) is str and kind.partition(".")[0] in sys.stdlib_module_names:
            names[name] = __import__(kind, fromlist=["*"])
    names["candidate"] = candidate.ask(("entry point", entry_point))
    if entry_point.isidentifier():
        names[entry_point] = names["candidate"]
    return names


def judge(code: str, tests: str, entry_point: str, candidate: Candidate) -> str:
    """Load the candidate's code over there and run the tests here.

    Returns:
        "" where they pass, else a letter and a line: F failed, M out of memory, T only in one process.
    """
    try:
        compiled = compile(tests, FILENAME, "exec", dont_inherit=True)
        candidate.send(wire.bytes_of(code))
        candidate.answer()
        names = names_for_tests(candidate, names_in(compiled), entry_point)
        exec(compiled, {**names, "__name__": "tests"})
    except NotPlainData as error:
        return f"T{error}"
    except BaseException as error:  # noqa: BLE001 the verdict is on whatever the tests raise
        return failure(error, tests)
    return ""


def failure(error: BaseException, tests: str) -> str:
    """The letter and the line for an exception that left the tests or the candidate."""
    if isinstance(error, CandidateGone):
        line = str(error)
    else:
        line = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILENAME:
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.splitlines()
    if 0 < number <= len(lines):
        line += f" (tests, line {number}: {lines[number - 1].strip()})"
    return ("M" if isinstance(error, MemoryError) else "F") + " ".join(line.split())[:SHOWN]
