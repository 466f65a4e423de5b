"""Unstructured code: the source of Python's standard library, split by file; no test says what is right."""

import ast
import platform
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..scratch.corpus import read, source_files
from .files import Row, Task

# A top-level statement, comment or decorator ends a function.
STOP = [f"\n{character}" for character in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_@#([{\"'"]
ABOUT = {
    "task": "stdlib_code",
    "language": "python",
    "python": platform.python_version(),
    "verifiable": "no: there are no unit tests, so RLVR does not apply; pass@1 of *_problems.jsonl is the share of "
    "continuations that compile, whatever they do",
    "max_new_tokens": 192,
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; files are shared out, then pieces drawn from each split's files."""

    train_files: float = 0.2
    validation_files: float = 0.08
    test_files: float = 0.16
    piece: int = 700  # characters at most
    pretrain: int = 7000
    train: int = 1500
    train_small: int = 300
    validation: int = 100
    test: int = 300
    validation_functions: int = 60
    test_functions: int = 200
    prompt: int = 500  # characters of a function's first line and docstring at most
    body: int = 500


SMOKE = Sizes(
    pretrain=120, train=40, train_small=10, validation=6, test=8, validation_functions=4, test_functions=6, piece=300
)


def make(sizes: Sizes, seed: int) -> Task:
    """All files of the task; no two splits share a source file, nor a piece of text.

    Raises:
        ValueError: This Python's standard library does not hold enough of something.
    """
    folders = split_files(source_files(), sizes, seed)
    files: dict[str, list[Row]] = {}
    splits: dict[str, list[str]] = {}
    taken: set[str] = set()  # by held-out splits, which come first: licences and other boilerplate recur
    for name in ("test", "validation", "train", "pretrain"):
        rng = Random(f"{seed} {name}")
        found = list(dict.fromkeys(piece for file in folders[name] for piece in pieces(read(file), sizes.piece)))
        found = [piece for piece in found if piece not in taken]
        rows = enough(name, rng.sample(found, len(found)), getattr(sizes, name))
        taken.update(rows)
        splits[name] = rows
        files[name] = [{"text": text} for text in rows]
    files["train_small"] = files["train"][: sizes.train_small]
    known = "\n".join(normalised(read(file)) for name in ("train", "pretrain") for file in folders[name])
    prompts: set[str] = set()
    for name in ("test", "validation"):
        count = getattr(sizes, f"{name}_functions")
        rows = new_functions(name, folders[name], known, prompts, count, sizes, Random(f"{seed} {name}_functions"))
        found = [row["prompt"] for row in rows]
        prompts.update(found)
        splits[name] = [*splits[name], *found]
        files[f"{name}_functions"] = rows
        files[f"{name}_problems"] = [problem(row) for row in rows]
    return Task(files, splits, {**ABOUT, "files": {name: len(paths) for name, paths in folders.items()}})


def new_functions(
    name: str, paths: Sequence[Path], known: str, taken: Collection[str], count: int, sizes: Sizes, rng: Random
) -> list[Row]:
    """So many functions at random, as documents; none whose body training files hold as well, or whose prompt recurs.

    Raises:
        ValueError: There are fewer.
    """
    found = dict(each for path in paths for each in functions(read(path), sizes.prompt, sizes.body))
    rows = []
    for prompt in rng.sample(list(found), len(found)):
        if len(rows) < count and prompt not in taken and normalised(found[prompt]) not in known:
            rows.append({"id": f"{name}/{len(rows)}", "prompt": prompt, "completion": found[prompt]})
    return enough(f"{name}_functions", rows, count)


def split_files(files: Sequence[Path], sizes: Sizes, seed: int) -> dict[str, list[Path]]:
    """The files of each split; what is left is for pretrain."""
    shuffled = Random(f"{seed} files").sample(files, len(files))
    found = {}
    for name in ("test", "validation", "train"):
        count = int(len(files) * getattr(sizes, f"{name}_files"))
        found[name], shuffled = shuffled[:count], shuffled[count:]
    return {**found, "pretrain": shuffled}


def enough(name: str, found: list, count: int) -> list:
    """The first so many.

    Raises:
        ValueError: There are fewer.
    """
    if len(found) < count:
        raise ValueError(
            f"{name}={count}, but this Python's standard library yields only {len(found)}: lower it, or use another "
            "Python with the library's source code"
        )
    return found[:count]


def pieces(text: str, most: int) -> Iterator[str]:
    """A file cut between lines into pieces of at most so many characters, at blank lines where one is near.

    A single line that is longer is left out, and so is what is shorter than a quarter of `most`.
    """
    piece: list[str] = []
    for line in text.splitlines(keepends=True):
        size = sum(map(len, piece))
        if piece and (size + len(line) > most or (not line.strip() and size > most * 0.6)):
            yield from whole(piece, most)
            piece = []
        piece.append(line)
    yield from whole(piece, most)


def whole(lines: list[str], most: int) -> Iterator[str]:
    """The lines as one piece, if its length is in bounds."""
    piece = "".join(lines).strip("\n") + "\n"
    if most / 4 <= len(piece) <= most:
        yield piece


def functions(text: str, longest_prompt: int, longest_body: int) -> Iterator[tuple[str, str]]:
    """`(first line and docstring, body)` of each function that can stand alone at module level.

    Decorators are left out, and so are functions with annotations or computed defaults: they would run at definition.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or ast.get_docstring(node) is None:
            continue
        first, docstring, end = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
        if docstring is None or end is None or node.body[1].lineno <= docstring or not stands_alone(node):
            continue
        source = textwrap.dedent("".join(lines[first:end]))
        prompt = "".join(source.splitlines(keepends=True)[: docstring - first])
        body = source[len(prompt) :].lstrip("\n")
        if not body.endswith("\n"):
            body += "\n"
        if len(prompt) <= longest_prompt and len(body) <= longest_body and compiles(prompt + body):
            yield prompt, body


def stands_alone(node: ast.FunctionDef) -> bool:
    """Whether nothing but a constant is evaluated when the function is defined."""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotated = node.returns is not None or any(each is not None and each.annotation is not None for each in every)
    defaults = [*arguments.defaults, *arguments.kw_defaults]
    return not annotated and all(each is None or isinstance(each, ast.Constant) for each in defaults)


def compiles(source: str) -> bool:
    """Whether it is a program of one function at module level."""
    try:
        tree = ast.parse(source)
        compile(tree, "<function>", "exec")
    except (SyntaxError, ValueError):
        return False
    return len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef)


def normalised(text: str) -> str:
    """Text without indentation and blank lines, to find a method's body in a file again."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def problem(row: Row) -> Row:
    """Passed by whatever compiles: running a definition does not run its body."""
    return {"id": row["id"], "prompt": row["prompt"], "tests": "pass\n", "stop": STOP}
