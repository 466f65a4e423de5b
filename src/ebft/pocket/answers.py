"""How the answers of the Q&A coding task are written: four styles, and the habits that choose among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from .operations import AGGREGATE, FILTER, MAP, WHOLE, Operation

Step = tuple[Operation, int]  # with its parameter
Program = tuple[Step, ...]

LOOP, COMPREHENSION, FUNCTIONAL, NESTED = STYLES = ("loop", "comprehension", "functional", "nested")
_FRESH, _LETTERS, _REUSED = ("ys", "zs", "ws", "us"), ("a", "b", "c", "d"), ("xs",) * 4
NAMINGS = {"fresh": _FRESH, "letters": _LETTERS, "reused": _REUSED}


@dataclass(frozen=True)
class Habits:
    """A conditional distribution of answers, stated as shares.

    Attributes:
        styles: Kind of the first operation -> share of each style.
        elements: Style -> share of each name of an element.
        namings: Style -> share of each way to name results.
        usual: Share of an operation's usual expression, where there are two.
    """

    styles: Mapping[str, Mapping[str, float]]
    elements: Mapping[str, Mapping[str, float]]
    namings: Mapping[str, Mapping[str, float]]
    usual: float


# Of all splits but pretrain: what an answer looks like depends on the first operation.
TASK = Habits(
    styles={
        FILTER: {LOOP: 0.1, COMPREHENSION: 0.6, FUNCTIONAL: 0.1, NESTED: 0.2},
        MAP: {LOOP: 0.1, COMPREHENSION: 0.2, FUNCTIONAL: 0.6, NESTED: 0.1},
        WHOLE: {LOOP: 0.3, COMPREHENSION: 0.1, FUNCTIONAL: 0.1, NESTED: 0.5},
        AGGREGATE: {LOOP: 0.3, COMPREHENSION: 0.1, FUNCTIONAL: 0.1, NESTED: 0.5},
    },
    elements={
        LOOP: {"n": 0.7, "x": 0.2, "v": 0.1},
        COMPREHENSION: {"x": 0.7, "n": 0.2, "v": 0.1},
        FUNCTIONAL: {"v": 0.7, "x": 0.2, "n": 0.1},
        NESTED: {"x": 0.8, "n": 0.1, "v": 0.1},
    },
    namings={
        LOOP: {"fresh": 0.8, "letters": 0.2},
        COMPREHENSION: {"reused": 0.7, "fresh": 0.2, "letters": 0.1},
        FUNCTIONAL: {"letters": 0.7, "reused": 0.2, "fresh": 0.1},
        NESTED: {"fresh": 0.5, "letters": 0.5},
    },
    usual=0.8,
)

# Of pretrain: no preference, whatever the operation. All forms are known, how often each is right is not.
_MIX: dict[str, float] = dict.fromkeys(STYLES, 0.25)
_ELEMENTS = {"x": 0.34, "n": 0.33, "v": 0.33}
_NAMES = {"fresh": 0.34, "letters": 0.33, "reused": 0.33}
PRETRAIN = Habits(
    styles=dict.fromkeys((FILTER, MAP, WHOLE, AGGREGATE), _MIX),
    elements=dict.fromkeys(STYLES, _ELEMENTS),
    namings={**dict.fromkeys(STYLES, _NAMES), LOOP: {"fresh": 0.5, "letters": 0.5}},
    usual=0.5,
)


def draw(shares: Mapping[str, float], rng: Random) -> str:
    """One of the names, each with its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def answer(program: Program, habits: Habits, rng: Random) -> tuple[str, str]:
    """`(style, body of the function)`, drawn from the habits."""
    style = draw(habits.styles[program[0][0].kind], rng)
    element = draw(habits.elements[style], rng)
    results = NAMINGS[draw(habits.namings[style], rng)]
    codes = [_code(operation, habits.usual, rng) for operation, _ in program]
    return style, body(program, style, element, results, codes)


def _code(operation: Operation, usual: float, rng: Random) -> str:
    """One of an operation's expressions, or "" if there are only statements."""
    if len(operation.code) < 2:
        return "".join(operation.code)
    return operation.code[0 if rng.random() < usual else 1]


def body(program: Program, style: str, element: str, results: Sequence[str], codes: Sequence[str]) -> str:
    """The indented body of `f(xs)`, with a line break at its end.

    Args:
        program: What it does.
        style: One of `STYLES`; an operation without an expression is a loop in all of them, and one without
            statements an expression.
        element: Name of a list's element.
        results: Names of the results so far, one per stage.
        codes: The expression of each stage.
    """
    lines: list[str] = []
    value = "xs"
    names = iter(results)
    for stage, ((operation, parameter), code) in enumerate(zip(program, codes, strict=True), 1):
        loop = _loop(operation, code) if style == LOOP or not code else ()
        if not value.isidentifier() and (loop or code.count("{xs}") > 1):
            lines.append(f"{(name := next(names))} = {value}")
            value = name
        if loop:
            out = "total" if operation.kind == AGGREGATE else next(names)
            lines += [line.format(xs=value, x=element, k=parameter, out=out) for line in loop]
            value = out
            continue
        value = _expression(operation, code, style, element).format(xs=value, x=element, k=parameter)
        if style != NESTED and stage < len(program):
            lines.append(f"{(name := next(names))} = {value}")
            value = name
    lines.append(f"return {value}")
    return "".join(f"    {line}\n" for line in lines)


def _loop(operation: Operation, code: str) -> tuple[str, ...]:
    """Templates of statements that do an operation; none if it has only an expression."""
    if operation.kind == FILTER:
        return ("{out} = []", "for {x} in {xs}:", f"    if {code}:", "        {out}.append({x})")
    if operation.kind == MAP:
        return ("{out} = []", "for {x} in {xs}:", f"    {{out}}.append({code})")
    return operation.loop


def _expression(operation: Operation, code: str, style: str, element: str) -> str:
    """Template of an expression of {xs}."""
    if operation.kind not in (FILTER, MAP):
        return code
    if style == FUNCTIONAL:
        return f"list({operation.kind}(lambda {element}: {code}, {{xs}}))"
    return "[{x} for {x} in {xs} if " + code + "]" if operation.kind == FILTER else "[" + code + " for {x} in {xs}]"
