"""One command per task: data files, checks, and a base model trained from scratch on two cores in minutes."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..evaluation.translation import LANGUAGE_NAMES
from ..scratch.corpus import train_tokenizer
from ..scratch.folder import prepare_folder, quiet
from . import parallel_text, qa_coding, stdlib_code, translation
from .base import SMOKE_BASE, BaseSizes, train_base
from .files import Row, Task, check_boundary, check_splits, write_about, write_rows

TASKS = {"qa_coding": qa_coding, "stdlib_code": stdlib_code, "translation": translation}
BASES = {"qa_coding": BaseSizes(), "stdlib_code": BaseSizes(batch_size=4), "translation": BaseSizes()}


def main(argv: Sequence[str] | None = None) -> None:
    """Make a pocket task from the command line."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    folder = options.output_dir or Path("pocket") / options.task
    try:
        check(options)
        task, sizes = make(options)
        artifacts = ["base", "untrained", "task.json", *(f"{name}.jsonl" for name in task.files)]
        prepare_folder(folder, options.overwrite, artifacts, "pocket task")
        quiet()
        base = SMOKE_BASE if options.smoke else BASES[options.task]
        run(folder, task, base, {"seed": options.seed, "smoke": options.smoke, "sizes": sizes})
    except ValueError as error:
        parser.error(str(error))


def check(options: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        ValueError: One of parallel text is given for another task, or without the text.
    """
    if options.seed < 0:
        raise ValueError(f"seed={options.seed} must be at least 0")
    if options.parallel_text is not None and options.task != "translation":
        raise ValueError(f"parallel_text={str(options.parallel_text)!r} is for the task translation: leave it out")
    for name in ("parallel_validation", "direction", "language_names"):
        value = getattr(options, name)
        if value and options.parallel_text is None:
            raise ValueError(f"{name}={str(value)!r} needs --parallel_text; without, it does nothing")
    for pair in options.language_names:
        if not all(pair.partition("=")):
            raise ValueError(f"language_names: {pair!r} is not CODE=NAME, such as gsw=Alemannic")


def make(options: argparse.Namespace) -> tuple[Task, dict[str, Any]]:
    """`(task, its sizes)`, with splits that share no prompt."""
    module = TASKS[options.task] if options.parallel_text is None else parallel_text
    sizes = module.SMOKE if options.smoke else module.Sizes()
    if options.parallel_text is None:
        task = TASKS[options.task].make(sizes, options.seed)
    else:
        names = LANGUAGE_NAMES | dict(pair.split("=", 1) for pair in options.language_names)
        files = (options.parallel_text, options.parallel_validation)
        task = parallel_text.make(*files, options.direction, names, sizes, options.seed)
    check_splits(task.splits)
    return task, asdict(sizes)


def run(folder: Path, task: Task, sizes: BaseSizes, about: dict[str, Any]) -> None:
    """Write the files, train the base model, check that prompts end where tokens do, and say what is there."""
    console = Console()
    console.rule("1. Files")
    for name, rows in task.files.items():
        write_rows(folder / f"{name}.jsonl", rows)
        console.print(f"{len(rows):>7} rows  {folder}/{name}.jsonl", highlight=False)

    console.rule("2. Base model")
    texts = [row["text"] for row in task.files["pretrain"]]
    tokenizer = train_tokenizer(texts, sizes.vocab_size)
    for name, rows in task.files.items():
        check_boundary(name, filter(is_document, rows), tokenizer)
    seconds = train_base(folder, texts, tokenizer, sizes, about["seed"])
    write_about(folder, task, {**about, "base": asdict(sizes), "base_training_seconds": round(seconds, 1)})
    console.print(f"{folder}/base is trained, in {seconds:.0f} s; {folder}/task.json says what is what.")


def is_document(row: Row) -> bool:
    """Whether a row has a prompt and its completion."""
    return "completion" in row


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ebft.pocket", description=__doc__)
    parser.add_argument("task", choices=TASKS, help="which")
    parser.add_argument("--output_dir", type=Path, help="where its files go; default: pocket/TASK")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier pocket task in output_dir")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order; default: %(default)s")
    parser.add_argument(
        "--smoke", action="store_true", help="a version of seconds that only shows that all parts work"
    )
    real = parser.add_argument_group("translation, from real text in place of the invented language")
    real.add_argument("--parallel_text", type=Path, help="a file in a format of `ebft evaluate --translation`")
    real.add_argument("--parallel_validation", type=Path, help="another one, to hold out; default: part of the first")
    real.add_argument("--direction", help="such as de-en, where the text does not say")
    real.add_argument("--language_names", nargs="+", default=[], help="names that are not known: CODE=NAME ...")
    return parser


if __name__ == "__main__":
    sys.exit(main())
