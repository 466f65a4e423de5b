"""Sandboxes for tests: each layer that really works on this machine, found by running something in it."""

from functools import cache

import pytest

from ebft.sandbox import Limits, Outcome, Program, Sandbox, Verdict, available_languages

QUICK = Limits(wall_seconds=3, cpu_seconds=1, memory_mib=192, processes=16, file_mib=4, output_kib=64)
GOOD = ("def double(x):\n    return 2 * x\n", "assert double(4) == 8\n")
BAD = ("def double(x):\n    return 3 * x\n", "assert double(4) == 8\n")
NODE = pytest.mark.skipif("javascript" not in available_languages(), reason="needs node (apt-get install nodejs)")


@cache
def sandbox(name: str, limits: Limits = QUICK) -> Sandbox:
    return Sandbox(limits, only=name, allow_weak=name == "weak")


def works(name: str) -> bool:
    try:
        sandbox(name)
    except RuntimeError:
        return False
    return True


NEEDS = {
    "bubblewrap": "bubblewrap (apt-get install bubblewrap), and root or user namespaces",
    "namespaces": "root, or user namespaces",
    "weak": "to be an ordinary user, or a Python that every user may read",
}
HERE = [name for name in NEEDS if works(name)]  # one test says what is missing; the others run in what is here
ALL = HERE
STRONG = [name for name in HERE if name != "weak"]
STRONGEST = STRONG[:1]  # for what has nothing to do with the layer
APART = [True, False]  # whether code and tests run in two processes


def run(name: str, code: str, tests: str, apart: bool = True, entry_point: str = "double", limits=QUICK) -> Outcome:
    return sandbox(name, limits).run(Program(code, tests, entry_point=entry_point if apart else None))


def still_judges(name: str) -> None:
    """A good program passes and a bad one fails."""
    assert run(name, *GOOD, apart=True).verdict is Verdict.PASSED
    assert run(name, *BAD, apart=False).verdict is Verdict.FAILED
