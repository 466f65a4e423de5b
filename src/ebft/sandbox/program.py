"""What a sandbox is given and what it answers: limits, programs, verdicts."""

import math
import shutil
import sys
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path


class Verdict(StrEnum):
    """How a run ended. Only `PASSED` counts as a pass; the others say why not."""

    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    REFUSED = "refused"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_seconds: From the start of the program to its end.
        cpu_seconds: User and system time of all its processes together.
        memory_mib: Address space of each process (resident memory for JavaScript, whose engine reserves far more than
            it uses), and resident memory of all of them together.
        processes: Processes and threads at one time. JavaScript's engine alone has a dozen.
        open_files: File descriptors of each process.
        file_mib: Size of the temporary folder, and of a single file.
        output_kib: What it may print, to stdout and stderr together.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_mib: int = 1024
    processes: int = 32
    open_files: int = 64
    file_mib: int = 16
    output_kib: int = 256

    def __post_init__(self):
        """Refuse what no program could run under.

        Raises:
            ValueError: A limit is not a finite number above zero, or is below what the interpreter itself needs.
        """
        least = {"memory_mib": 64, "open_files": 16}
        for field in fields(self):
            value = getattr(self, field.name)
            whole = "seconds" not in field.name
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{field.name}={value!r} has to be {'a whole number' if whole else 'a number'}.")
            lowest = least.get(field.name, 1 if whole else 0)
            if not math.isfinite(value) or value < lowest or value == 0:
                wanted = f"at least {lowest}" if lowest else "above 0 and finite"
                raise ValueError(f"{field.name}={value!r} has to be {wanted}.")


@dataclass(frozen=True)
class Program:
    """A candidate's code and the tests that judge it.

    Attributes:
        code: The candidate's code: prompt and completion.
        tests: Trusted code, run after it. It sees the candidate's names and, where there is an entry point, that as
            `candidate`. The program passes if the tests run to their end without an exception.
        language: One of `available_languages()`.
        entry_point: Python only. The function under test, a name or an expression such as `Solution().solve`. With it
            code and tests run in two processes that exchange plain data, so that the code cannot touch the tests;
            tests for which that is impossible (they pass a function of their own, say) run in one process all the
            same, and the outcome's detail says so. Without it they run in one process.
    """

    code: str
    tests: str = ""
    language: str = "python"
    entry_point: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        verdict: How it ended.
        detail: One short line: the exception and the line of the tests, the limit, or why it was refused.
        seconds: Wall time from the start of the isolated process to its end.
    """

    verdict: Verdict
    detail: str
    seconds: float


def available_languages() -> dict[str, str]:
    """Languages that programs may be in, and the interpreter of each: this one for Python, `node` for JavaScript."""
    # The base interpreter: a virtual environment's is a link to it, and no program may import what was installed.
    python = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    found = {"python": str(python)}
    node = shutil.which("node")
    if node:
        found["javascript"] = str(Path(node).resolve())
    return found
