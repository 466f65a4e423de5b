"""Runs programs in the strongest sandbox that this machine has, several at a time."""

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from .inside import wire
from .layers import HARNESS, INSIDE, LAYERS, Layer
from .program import Limits, Outcome, Program, Verdict, available_languages

VERDICTS = {"P": Verdict.PASSED, "F": Verdict.FAILED, "M": Verdict.OUT_OF_MEMORY, "L": Verdict.TIMED_OUT}
ONE_PROCESS = "T"  # the keeper's letter for tests that cannot run apart from the code
GRACE = 20.0  # seconds that setting up and taking down may take on a busy machine
FILES = 10_000  # in the temporary folder; each takes memory of the kernel's
# Imports what the harness does not, so that a standard library out of sight is noticed.
PROBE = Program("import colorsys\ndef f(x):\n    return x + 1", "assert f(1) == 2", entry_point="f")


class Sandbox:
    """Runs untrusted programs, each in fresh processes without network, files, environment or privileges.

    Args:
        limits: What one program may use.
        workers: Programs at a time; the number of CPUs if None.
        allow_weak: Run even where nothing but resource limits is available. Then a program can read and change what
            this user can: for code that you would run yourself.
        only: `bubblewrap`, `namespaces` or `weak` (which needs `allow_weak`): this layer and no other.

    Attributes:
        layer: One line that says what protects.

    Raises:
        ValueError: `workers` or `only` is none.
        RuntimeError: No layer works here, or only the weak one and it is not allowed.
    """

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008 it is frozen
        *,
        workers: int | None = None,
        allow_weak: bool = False,
        only: str | None = None,
    ):
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers} has to be at least 1, or None for one per CPU.")
        if only not in (None, *LAYERS):
            raise ValueError(f"only={only!r} is no layer; choose one of {', '.join(LAYERS)}.")
        if not sys.platform.startswith("linux"):
            raise RuntimeError(f"untrusted code cannot be shut in on {sys.platform}: the sandbox needs Linux.")
        self.limits = limits
        self.workers = workers or len(os.sched_getaffinity(0))
        self._layer = self._strongest(allow_weak, only)
        self.layer = self._layer.description

    def _strongest(self, allow_weak: bool, only: str | None) -> Layer:
        problems = []
        for name, make in LAYERS.items():
            if name == "weak" and not allow_weak:
                problems.append("weak: allow_weak is False")
            elif only in (None, name):
                outcome = run_in(make(), self.limits, PROBE)
                if outcome.verdict is Verdict.PASSED:
                    return make()
                problems.append(f"{name}: {outcome.detail}")
        raise RuntimeError(
            f"untrusted code cannot be shut in here ({'; '.join(problems)}). Install bubblewrap (apt-get install "
            "bubblewrap) and allow user namespaces, or accept that programs can read and change your files: "
            "allow_weak=True (as root, with a Python that every user may read)."
        )

    def run(self, program: Program) -> Outcome:
        """Run one program and its tests.

        A program's own failure is an outcome, never an exception; so is a language that is not installed (refused).
        """
        return run_in(self._layer, self.limits, program)

    def run_all(
        self, programs: Iterable[Program], on_done: Callable[[int, Outcome], None] | None = None
    ) -> list[Outcome]:
        """Run many programs, several at a time.

        Args:
            programs: Which.
            on_done: Called with a program's place and outcome as each ends, in the threads that run them.

        Returns:
            Outcomes, in the order of the programs.
        """

        def one(item: tuple[int, Program]) -> Outcome:
            outcome = self.run(item[1])
            if on_done is not None:
                on_done(item[0], outcome)
            return outcome

        with ThreadPoolExecutor(self.workers, "sandbox") as pool:
            return list(pool.map(one, enumerate(programs)))


def run_in(layer: Layer, limits: Limits, program: Program) -> Outcome:
    """Run a program in a layer, its tests in a process of their own where that is asked for and possible."""
    interpreter = available_languages().get(program.language)
    if interpreter is None:
        known = ", ".join(available_languages())
        line = f"language={program.language!r} is not installed or not known; there is {known}"
        return Outcome(Verdict.REFUSED, line, 0.0)
    note, begun = "", time.monotonic()
    if program.language == "javascript":
        letter, line = attempt(layer, limits, program, "command", interpreter)
    elif program.entry_point is None:
        letter, line = attempt(layer, limits, program, "together", interpreter)
    else:
        letter, line = attempt(layer, limits, program, "separate", interpreter)
        if letter == ONE_PROCESS:
            letter, line = attempt(layer, limits, program, "together", interpreter)
            note = "tests and program in one process"
    detail = "; ".join(filter(None, (line, note)))
    return Outcome(VERDICTS.get(letter, Verdict.REFUSED), detail, time.monotonic() - begun)


def attempt(layer: Layer, limits: Limits, program: Program, mode: str, interpreter: str) -> tuple[str, str]:
    """One isolated run.

    Args:
        layer: How to isolate.
        limits: What the program may use.
        program: Which.
        mode: `separate` or `together` for Python, `command` for an interpreter that runs `together.js`.
        interpreter: That interpreter.

    Returns:
        The keeper's letter and line, or "R" (refused) and why there is none.
    """
    nonce, tool = secrets.token_hex(16), layer.command(limits, 0, 0)[0]
    if shutil.which(tool) is None:
        return "R", f"{tool} is not installed"
    inside = INSIDE if layer.pid_namespace else str(HARNESS)
    heap = f"--max-old-space-size={limits.memory_mib}"
    uid = layer.uid()
    setup = {
        "mode": mode,
        "limits": {**asdict(limits), "files": FILES if layer.pid_namespace else 0},
        "uid": uid,
        "pid_namespace": layer.pid_namespace,
        "own_count": layer.own_count,
        "command": [interpreter, heap, f"{inside}/inside/together.js"],
    }
    job = {"nonce": nonce, "code": program.code, "tests": program.tests, "entry_point": program.entry_point or ""}
    messages = [wire.encode(message, int) for message in (setup, job)]
    with started(layer, limits, uid) as (process, job_fd, verdict_fd):
        with contextlib.suppress(BrokenPipeError):  # a layer that does not work says why on its way out
            for message in messages:
                wire.send(job_fd, message)
        deadline = time.monotonic() + limits.wall_seconds + GRACE
        first, last = answer(verdict_fd, deadline), answer(verdict_fd, deadline)
        if time.monotonic() > deadline:
            return "L", f"more than {limits.wall_seconds:g} s"
        if first != b"started":
            process.kill()
            said = (process.communicate()[1] or b"").decode("utf-8", "replace").split("\n")
            return "R", next((line.strip() for line in reversed(said) if line.strip()), "the sandbox did not start")
        if not last:
            return "F", "the sandbox ended without a verdict"
        letter, line, proof = wire.decode(last, int)
    if letter == "P" and proof != nonce:
        return "F", "a verdict without the nonce"
    return letter, line


@contextlib.contextmanager
def started(layer: Layer, limits: Limits, uid: int | None) -> Iterator[tuple[subprocess.Popen, int, int]]:
    """An isolated process with a pipe in each direction; at the end it and what it started are gone."""
    job, verdict = os.pipe(), os.pipe()
    folder = "/" if layer.pid_namespace else tempfile.mkdtemp(prefix="sandbox-")
    home = "/tmp" if layer.pid_namespace else folder
    if uid is not None and not layer.pid_namespace:
        os.chown(folder, uid, uid)
    try:
        process = subprocess.Popen(
            layer.command(limits, job[0], verdict[1]),
            pass_fds=(job[0], verdict[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"},
            cwd=folder,
            start_new_session=True,
        )
    finally:
        os.close(job[0])
        os.close(verdict[1])
    try:
        with process:
            try:
                yield process, job[1], verdict[0]
                process.wait(GRACE)
            finally:
                # The keeper ends by itself. Where it could not, the kernel ends a namespace with its first process; a
                # group has to be ended one and all.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(job[1])
        os.close(verdict[0])
        if not layer.pid_namespace:
            shutil.rmtree(folder, ignore_errors=True)


def answer(fd: int, deadline: float) -> bytes:
    """The keeper's next message; empty if it ends, or the deadline passes, without one."""
    left = deadline - time.monotonic()
    if left <= 0 or not select.select([fd], [], [], left)[0]:
        return b""
    try:
        return wire.receive(fd)
    except EOFError:
        return b""
