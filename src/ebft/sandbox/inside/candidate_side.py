"""The candidate's process: runs its code, then answers the tests' questions with plain data."""

import builtins
import sys
import types

from . import wire


class References:
    """Objects that are not plain data, by the numbers that stand for them on the other side."""

    def __init__(self):
        self.objects = []
        self.numbers = {}

    def number(self, value) -> int:
        """The number of an object, the same each time."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]


def load(code: str) -> dict:
    """Run a candidate's code as a module, and return its names.

    Raises:
        BaseException: Whatever the code raises.
    """
    # A module that can be found by name, as dataclasses and pickle expect of the module of a class.
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    exec(compile(code, "<candidate>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def builtin_name(error: BaseException) -> str:
    """The nearest built-in exception that an exception is a kind of."""
    kinds = (kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    return next(kinds, "Exception")


def message_of(error: BaseException) -> str:
    """What an exception was made with, which for a KeyError is not its text."""
    return str(error.args[0]) if len(error.args) == 1 else str(error)


def serve(read_fd: int, write_fd: int) -> None:
    """Answer until the tests are done. The first message is the code, every later one a question."""
    references = References()
    names = {}

    def reply(answer) -> None:
        try:
            data = wire.encode((True, answer()), references.number)
        except BaseException as error:  # noqa: BLE001 whatever the code raises is an answer, SystemExit too
            data = wire.encode((False, builtin_name(error), message_of(error)[:500]), references.number)
        wire.send(write_fd, data)

    code = wire.text_of(wire.receive(read_fd))
    reply(lambda: names.update(load(code)))
    while True:
        question = wire.decode(wire.receive(read_fd), references.objects.__getitem__)
        reply(lambda question=question: answer_to(question, names))


def answer_to(question, names: dict):
    """What one question asks for."""
    kind, target, *rest = question
    if kind == "names":
        return {name: (described(names[name]), names[name]) for name in target if name in names}
    if kind == "entry point":
        return eval(target, names)
    if kind == "call":
        return target(*rest[0], **rest[1])
    if kind == "list":
        return list(target)
    if kind == "length":
        return len(target)
    if kind == "get":
        return getattr(target, rest[0])
    assert kind == "set"
    return setattr(target, *rest)


def described(value) -> str:
    """The name of a module, for the other side to import its own; else nothing."""
    return value.__name__ if isinstance(value, types.ModuleType) else ""
