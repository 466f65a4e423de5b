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

strong = pytest.mark.parametrize("layer", STRONG)
strongest = pytest.mark.parametrize("layer", STRONGEST)
every = pytest.mark.parametrize("layer", ALL)
modes = pytest.mark.parametrize("apart", APART, ids=["apart", "together"])


def run(name: str, code: str, tests: str, apart: bool = True, entry_point: str = "double", limits=QUICK) -> Outcome:
    return sandbox(name, limits).run(Program(code, tests, entry_point=entry_point if apart else None))


def still_judges(name: str) -> None:
    """A good program passes and a bad one fails."""
    assert run(name, *GOOD, apart=True).verdict is Verdict.PASSED
    assert run(name, *BAD, apart=False).verdict is Verdict.FAILED


ATTEMPT = """
import os
def attempt(*steps):
    done = []
    for name, step in steps:
        try:
            step()
            done.append(name)
        except Exception:
            pass
    return done
"""


def achieves(layer, body, expected="[]", apart=True, before=ATTEMPT, limits=QUICK):
    """Run `double`, whose result is compared out of its reach; then see that the layer still judges."""
    code = before + "\ndef double(x):\n" + "".join(f"    {line}\n" for line in body.strip().splitlines())
    tests = f"got = double(4)\nif got != {expected}: raise RuntimeError(str(got))"
    outcome = run(layer, code, tests, apart, limits=limits)
    still_judges(layer)
    assert outcome.verdict is Verdict.PASSED, outcome
