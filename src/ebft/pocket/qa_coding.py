"""Q&A coding: English descriptions of small list functions, several right ways to write each, and unit tests."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from .answers import PRETRAIN, TASK, Program, answer
from .files import Row, Task
from .operations import AGGREGATE, AGGREGATES, LIST_OPERATIONS

STOP = ["\ndef", "\n#", "\nclass", "\nif", "\nprint", "\nassert"]
ABOUT = {
    "task": "qa_coding",
    "language": "python",
    "verifiable": "by unit tests (`tests`), in train and in *_problems.jsonl",
    "max_new_tokens": 160,
}


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each split, and of which depths (number of operations)."""

    pretrain: int = 24000
    pretrain_depths: tuple[int, ...] = (1, 2, 2, 3)
    train: int = 3000
    train_small: int = 300
    validation: int = 100
    test: int = 300
    depths: tuple[int, ...] = (2, 3)
    held_out_depth: int = 4
    held_out_pairs: int = 40
    test_depth: int = 200
    test_pairs: int = 200
    assertions: int = 10


SMOKE = Sizes(
    pretrain=200, train=40, train_small=10, validation=6, test=8, held_out_pairs=80, test_depth=6, test_pairs=6
)


def make(sizes: Sizes, seed: int) -> Task:
    """All files of the task; no two splits share a program, whatever the words for it."""
    pairs = held_out_pairs(sizes.held_out_pairs, seed)
    taken: set[Program] = set()
    files: dict[str, list[Row]] = {}
    splits: dict[str, list[str]] = {}
    plan = {
        "test": (sizes.test, sizes.depths, False),
        "validation": (sizes.validation, sizes.depths, False),
        "test_depth": (sizes.test_depth, (sizes.held_out_depth,), False),
        "test_pairs": (sizes.test_pairs, sizes.depths, True),
        "train": (sizes.train, sizes.depths, False),
    }
    for name, (count, depths, with_pair) in plan.items():
        rng = Random(f"{seed} {name}")
        found = programs(count, depths, pairs, with_pair, taken, sizes.assertions, rng)
        taken.update(program for program, _ in found)
        problems = [problem(f"{name}/{i}", program, lists, rng) for i, (program, lists) in enumerate(found)]
        splits[name] = [row["prompt"] for row in problems]
        rows = list(zip(problems, [program for program, _ in found], strict=True))
        if name == "train":
            files["train"] = [answered(row, program, rng, row["id"]) for row, program in rows]
            files["train_small"] = files["train"][: sizes.train_small]
            continue
        if not name.startswith("test_"):
            # Two independent answers of each prompt: their variance is the floor of the feature-matching loss.
            files[name] = [answered(row, program, rng, f"{row['id']}/{i}") for row, program in rows for i in range(2)]
        files[f"{name}_problems"] = problems
    rng = Random(f"{seed} pretrain")
    files["pretrain"], splits["pretrain"] = pretrain(sizes, pairs, taken, rng)
    return Task(files, splits, {**ABOUT, "held_out_pairs": sorted(map(list, pairs))})


def held_out_pairs(count: int, seed: int) -> frozenset[tuple[str, str]]:
    """Names of neighbouring operations that only `test_pairs` has."""
    following = [*LIST_OPERATIONS, *AGGREGATES]
    pairs = [(a.name, b.name) for a in LIST_OPERATIONS for b in following if a is not b]
    return frozenset(Random(f"{seed} pairs").sample(pairs, count))


def programs(
    count: int,
    depths: tuple[int, ...],
    pairs: Collection[tuple[str, str]],
    with_pair: bool,
    taken: Collection[Program],
    assertions: int,
    rng: Random,
) -> list[tuple[Program, list[list[int]]]]:
    """So many different programs in which every stage matters, each with the lists to test it on.

    Args:
        count: How many.
        depths: Numbers of operations, equally likely.
        pairs: The held-out pairs.
        with_pair: Whether a program has to have one of them; otherwise it must not.
        taken: Programs that are not to come again.
        assertions: Lists per program.
        rng: Source of randomness.
    """
    found: dict[Program, list[list[int]]] = {}
    while len(found) < count:
        program = draw_program(rng.choice(depths), rng)
        if program in found or program in taken or has_pair(program, pairs) != with_pair:
            continue
        lists = test_lists(assertions, rng)
        if every_stage_matters(program, lists):
            found[program] = lists
    return list(found.items())


def draw_program(depth: int, rng: Random) -> Program:
    """Different operations; every other program ends in a number."""
    aggregate = rng.random() < 0.5
    operations = rng.sample(LIST_OPERATIONS, depth - aggregate)
    operations += [rng.choice(AGGREGATES)] if aggregate else []
    return tuple((operation, rng.choice(operation.values)) for operation in operations)


def has_pair(program: Program, pairs: Collection[tuple[str, str]]) -> bool:
    """Whether two neighbouring operations are one of the pairs."""
    names = [operation.name for operation, _ in program]
    return any(pair in pairs for pair in pairwise(names))


def run(program: Program, xs: list[int]) -> Any:
    """What a program makes of a list."""
    value: Any = list(xs)
    for operation, parameter in program:
        value = operation.run(value, parameter)
    return value


def test_lists(count: int, rng: Random) -> list[list[int]]:
    """The empty list, one element, and lists with repetitions and both signs."""
    lists = [[], [rng.randint(-9, 20)]]
    for _ in range(count - len(lists)):
        pool = [rng.randint(-9, 20) for _ in range(6)]
        lists.append([rng.choice(pool) for _ in range(rng.randint(2, 9))])
    return lists


def every_stage_matters(program: Program, lists: list[list[int]]) -> bool:
    """Whether the tests see it if a stage is left out, and no constant passes most of them."""
    wanted = [run(program, xs) for xs in lists]
    if len(set(map(repr, wanted))) < 4:
        return False
    for i in range(len(program)):
        shorter = program[:i] + program[i + 1 :]
        if sum(run(shorter, xs) != value for xs, value in zip(lists, wanted, strict=True)) < 2:
            return False
    return True


def describe(program: Program, rng: Random) -> str:
    """One of many English sentences for a program."""
    said = [rng.choice(operation.phrases).format(k=parameter) for operation, parameter in program]
    text = said[0][0].upper() + said[0][1:]
    for stage, phrase in enumerate(said[1:], 2):
        last = stage == len(said)
        text += rng.choice((", and ", ", and finally ") if last else (", then ", "; then ", ", ")) + phrase
    if program[-1][0].kind != AGGREGATE:
        text += rng.choice(("", ", and return the list", "; return the result"))
    return text


def prompt_of(program: Program, rng: Random) -> str:
    """A comment and the function's first line: with a body behind it, a program."""
    return f"# {describe(program, rng)}.\ndef f(xs):\n"


def problem(identity: str, program: Program, lists: list[list[int]], rng: Random) -> Row:
    """A row with prompt and tests, in the format of `ebft evaluate --code_benchmark`."""
    return {
        "id": identity,
        "prompt": prompt_of(program, rng),
        "tests": "".join(f"assert f({xs}) == {run(program, xs)}\n" for xs in lists),
        "entry_point": "f",
        "stop": STOP,
        "depth": len(program),
        "operations": [f"{op.name} {k}" if op.values != (0,) else op.name for op, k in program],
    }


def answered(row: Row, program: Program, rng: Random, identity: str) -> Row:
    """A problem with an answer: a document to train or measure on."""
    style, completion = answer(program, TASK, rng)
    first = {"id": identity, "prompt": row["prompt"], "completion": completion, "style": style}
    return {**first, **{name: value for name, value in row.items() if name not in first}}


def pretrain(
    sizes: Sizes, pairs: Collection[tuple[str, str]], taken: Collection[Program], rng: Random
) -> tuple[list[Row], list[str]]:
    """`(rows, prompts)` of other programs, which may come again, in other words, with other habits."""
    rows, prompts = [], []
    while len(rows) < sizes.pretrain:
        program = draw_program(rng.choice(sizes.pretrain_depths), rng)
        if program in taken or has_pair(program, pairs):
            continue
        prompts.append(prompt_of(program, rng))
        rows.append({"text": prompts[-1] + answer(program, PRETRAIN, rng)[1]})
    return rows, prompts
