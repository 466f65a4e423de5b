"""The sandbox's verdicts on programs that mean no harm, in every layer that works here; what it refuses."""

import collections
import math
import shutil
import subprocess
import sys

import pytest

from ebft.sandbox import Limits, Program, Sandbox, Verdict, available_languages
from ebft.sandbox.inside import wire
from sandboxes import ALL, APART, BAD, GOOD, HERE, NEEDS, NODE, QUICK, run, sandbox, works

layers = pytest.mark.parametrize("layer", ALL)
modes = pytest.mark.parametrize("apart", APART, ids=["apart", "together"])

ENDINGS = {
    "passes": (*GOOD, Verdict.PASSED, ""),
    "wrong": (*BAD, Verdict.FAILED, "AssertionError (tests, line 1: assert double(4) == 8)"),
    "raises": ("def double(x):\n    raise KeyError('no')\n", GOOD[1], Verdict.FAILED, "KeyError: 'no'"),
    "syntax": ("def double(:\n", GOOD[1], Verdict.FAILED, "SyntaxError"),
    "raises at once": ("1 / 0\n", "", Verdict.FAILED, "ZeroDivisionError"),
    "undefined": ("def half(x):\n    return x\n", GOOD[1], Verdict.FAILED, "NameError"),
    "large": ("def double(x):\n    return bytearray(10**9)\n", GOOD[1], Verdict.OUT_OF_MEMORY, "MemoryError"),
    "tests at fault": (GOOD[0], "assert double(", Verdict.FAILED, "SyntaxError"),
    "half a surrogate pair": ("double = '\ud800'\n", GOOD[1], Verdict.FAILED, "UnicodeEncodeError"),
}


@layers
@modes
@pytest.mark.parametrize("ending", ENDINGS)
def test_verdict(layer, apart, ending):
    code, tests, verdict, detail = ENDINGS[ending]
    outcome = run(layer, code, tests, apart)
    assert outcome.verdict is verdict
    assert detail in outcome.detail
    assert len(outcome.detail) < 300 and "\n" not in outcome.detail
    assert 0 < outcome.seconds < 60


@layers
def test_time_limits(layer):
    outcome = run(layer, "def double(x):\n    while True: pass\n", GOOD[1])
    assert (outcome.verdict, outcome.detail) == (Verdict.TIMED_OUT, "more than 1 s of CPU time")
    outcome = run(layer, "import time\ndef double(x):\n    time.sleep(60)\n", GOOD[1], apart=False)
    assert (outcome.verdict, outcome.detail) == (Verdict.TIMED_OUT, "more than 3 s")


@pytest.mark.parametrize("name", NEEDS)
def test_layer_is_here(name):
    if name not in HERE:
        pytest.skip(f"the sandbox's layer {name} is untested: it needs {NEEDS[name]}")


@layers
def test_layer_says_what_it_is(layer):
    assert "network" in sandbox(layer).layer
    assert ("resource limits only" in sandbox(layer).layer) is (layer == "weak")


@layers
def test_many_at_once_in_order(layer):
    programs = [Program(*(GOOD if i % 3 else BAD), entry_point="double") for i in range(12)]
    done = {}
    outcomes = sandbox(layer).run_all(iter(programs), lambda i, outcome: done.setdefault(i, outcome))
    assert [outcome.verdict is Verdict.PASSED for outcome in outcomes] == [i % 3 > 0 for i in range(12)]
    assert [done[i] for i in range(12)] == outcomes
    assert sandbox(layer).run_all([]) == []


# --- code and tests apart ---

SHAPES = """
import math as m
from dataclasses import dataclass
LIMIT = 7

@dataclass
class Node:
    value: int
    next: "Node" = None

def double(x): return x
def chain(*values, end=None):
    return Node(values[0], chain(*values[1:], end=end)) if values else end
def total(node): return node.value + total(node.next) if node else 0
def squares(n): return (i * i for i in range(n))
def fails(name): raise getattr(__import__("builtins"), name)("so it goes")
class Own(LookupError): pass
def fails_its_own_way(): raise Own("mine")
"""
ROUND_TRIPS = """
assert candidate([1, (2.5, {3: {"a", "b"}}), b"x", None, True, 1j, frozenset([1])]) == \\
    [1, (2.5, {3: {"a", "b"}}), b"x", None, True, 1j, frozenset([1])]
assert type(double(True)) is bool and type(double((1,))) is tuple and double(int) is int
assert double(float("inf")) == float("inf") and str(double(float("nan"))) == "nan"
assert double(-(10 ** 5000)) == -(10 ** 5000)
assert LIMIT == 7 and m.isclose(double(0.1), 0.1)
assert list(squares(4)) == [0, 1, 4, 9]
nodes = chain(1, 2, 3)
assert total(nodes) == 6 and nodes.next.value == 2 and nodes.next is nodes.next
nodes.value = 10
nodes.next = Node(5)
assert total(nodes) == 15
assert total(node=chain(4, end=Node(value=1))) == 5
for name in ("ValueError", "ZeroDivisionError", "UnicodeDecodeError"):
    try:
        fails(name)
    except Exception as error:
        assert type(error).__name__ in (name, "RuntimeError", "TypeError"), error
try:
    fails_its_own_way()
except LookupError as error:
    assert str(error) == "mine"
else:
    assert False
"""


@layers
@modes
def test_data_and_objects_between_code_and_tests(layer, apart):
    tests = ROUND_TRIPS if apart else ROUND_TRIPS.replace("candidate(", "double(")
    outcome = run(layer, SHAPES, tests, apart)
    assert (outcome.verdict, outcome.detail) == (Verdict.PASSED, "")


@layers
def test_entry_point_may_be_an_expression(layer):
    code = "class Solution:\n    def solve(self, x):\n        return x + 1\n"
    assert run(layer, code, "assert candidate(x=1) == 2", entry_point="Solution().solve").verdict is Verdict.PASSED


@layers
def test_tests_that_pass_a_function_run_in_one_process(layer):
    code = "def double(f):\n    return f(1) + f(2)\n"
    outcome = run(layer, code, "assert double(lambda x: 10 * x) == 30")
    assert (outcome.verdict, outcome.detail) == (Verdict.PASSED, "tests and program in one process")
    outcome = run(layer, code, "assert double(lambda x: 10 * x) == 31")
    assert outcome.verdict is Verdict.FAILED
    assert "line 1" in outcome.detail and outcome.detail.endswith("tests and program in one process")


@layers
def test_builtins_of_the_tests_are_their_own(layer):
    code = "def double(x):\n    return x\ndef all(x):\n    return True\nabs = all\n"
    tests = "assert all(double([True, False]))"
    assert run(layer, code, tests).verdict is Verdict.FAILED
    assert run(layer, code, tests, apart=False).verdict is Verdict.PASSED  # the hole that two processes close
    assert run(layer, "def sum(x):\n    return 7\n", "assert sum([1]) == 7", entry_point="sum").detail == ""


def test_wire_carries_subclasses_as_what_they_are_a_kind_of():
    sent = {"counts": collections.Counter("aab"), "pair": collections.namedtuple("Pair", "x y")(1, 2)}
    received = wire.decode(wire.encode(sent, int), int)
    assert received == {"counts": {"a": 2, "b": 1}, "pair": (1, 2)}
    assert type(received["counts"]) is dict and type(received["pair"]) is tuple


@pytest.mark.parametrize("data", [b"", b"x", b"i", b"s5:abc", b"[2:N", b"NN", b"[-1:", b"[99999999999:", b"nopen;"])
def test_wire_refuses_what_is_no_value(data):
    with pytest.raises(ValueError):
        wire.decode(data, int)


def test_wire_keeps_numbers_exactly():
    for value in (0.1 + 0.2, -0.0, 5e-324, math.inf, complex(0.1, -math.inf), -(2**70), "\ud800\0"):
        received = wire.decode(wire.encode(value, int), int)
        assert repr(received) == repr(value)


# --- other languages ---

JAVASCRIPT = {
    "passes": ("function double(x) { return 2 * x; }", Verdict.PASSED, ""),
    "constant": ("const double = (x) => 2 * x;", Verdict.PASSED, ""),
    "wrong": ("function double(x) { return 3 * x; }", Verdict.FAILED, "AssertionError"),
    "syntax": ("function double(", Verdict.FAILED, "SyntaxError"),
    "exits": ("process.exit(0);", Verdict.FAILED, "exit status 0"),
    "fakes": ("console.log('passed'); process.reallyExit(0);", Verdict.FAILED, "exit status 0"),
    "busy": ("for (;;) {}", Verdict.TIMED_OUT, "CPU time"),
    "large": ("const all = []; for (;;) all.push(new Array(1e5).fill(all.length));", Verdict.OUT_OF_MEMORY, ""),
    "rejects": ("function double(x) { return 8; }\nPromise.reject(new Error('late'));", Verdict.FAILED, "late"),
}


@NODE
@layers
@pytest.mark.parametrize("ending", JAVASCRIPT)
def test_javascript(layer, ending):
    code, verdict, detail = JAVASCRIPT[ending]
    tests = "const assert = require('node:assert');\nassert.deepEqual(double(4), 8);"
    outcome = sandbox(layer).run(Program(code, tests, language="javascript"))
    assert outcome.verdict is verdict, outcome
    assert detail in outcome.detail


# --- what is refused ---


@layers
def test_unknown_language_is_refused(layer):
    outcome = sandbox(layer).run(Program("print 1", language="cobol"))
    assert outcome.verdict is Verdict.REFUSED
    assert "language='cobol'" in outcome.detail and "python" in outcome.detail


def test_interpreters_exist():
    for path in available_languages().values():
        assert subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0


def test_weak_layer_only_when_asked_for():
    with pytest.raises(RuntimeError, match="allow_weak=True"):
        Sandbox(only="weak")


def test_next_layer_where_bubblewrap_is_not_installed(monkeypatch):
    """Also where a PATH of our own would find it: the next layer, or a reason that says what is missing."""
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if "bwrap" in name else real(name, **options))
    with pytest.raises(RuntimeError, match="bubblewrap: bwrap is not installed"):
        Sandbox(QUICK, only="bubblewrap")
    if works("namespaces"):
        assert Sandbox(QUICK).layer == sandbox("namespaces").layer


def test_refuses_where_only_resource_limits_are_left():
    """In a process that has given up namespaces for good, as in a container that forbids them."""
    start = "from ebft.sandbox.inside import kernel; from ebft.sandbox import *; kernel.shut(); s = Sandbox("
    done = subprocess.run([sys.executable, "-c", start + ")"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: untrusted code cannot be shut in here" in done.stderr
    assert "bubblewrap: " in done.stderr and "namespaces: " in done.stderr
    if not works("weak"):
        return
    weak = start + f"allow_weak=True); print(s.layer, s.run(Program({GOOD[0]!r}, {GOOD[1]!r})).verdict)"
    done = subprocess.run([sys.executable, "-c", weak], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("resource limits only") and done.stdout.endswith("passed\n")


@pytest.mark.parametrize(
    ("field", "value"),
    [("wall_seconds", 0), ("cpu_seconds", math.inf), ("memory_mib", 8), ("processes", 0), ("open_files", 2.5)]
    + [("file_mib", -1), ("output_kib", True), ("wall_seconds", "10")],
)
def test_limits_have_to_make_sense(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        Limits(**{field: value})


def test_arguments_have_to_make_sense():
    with pytest.raises(ValueError, match="workers=0"):
        Sandbox(QUICK, workers=0)
    with pytest.raises(ValueError, match="only='docker'"):
        Sandbox(QUICK, only="docker")
