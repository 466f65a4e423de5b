"""One command per task: data files, checks, and a base model trained from scratch."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..scratch.folder import prepare_folder, quiet
from . import qa_coding
from .base import SMOKE_BASE, BaseSizes, train_base
from .files import Row, Task, check_boundary, check_splits, write_about, write_rows

TASKS = ("qa_coding",)


def main(argv: Sequence[str] | None = None) -> None:
    """Make a pocket task from the command line."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    folder = options.output_dir or Path("pocket") / options.task
    try:
        task, sizes, base = make(options)
        artifacts = ["base", "task.json", *(f"{name}.jsonl" for name in task.files)]
        prepare_folder(folder, options.overwrite, artifacts, "pocket task")
        quiet()
        run(folder, task, base, {"seed": options.seed, "smoke": options.smoke, "sizes": sizes})
    except ValueError as error:
        parser.error(str(error))


def make(options: argparse.Namespace) -> tuple[Task, dict[str, Any], BaseSizes]:
    """`(task, its sizes, those of its base model)`."""
    base = SMOKE_BASE if options.smoke else BaseSizes()
    sizes = qa_coding.SMOKE if options.smoke else qa_coding.Sizes()
    return qa_coding.make(sizes, options.seed), asdict(sizes), base


def run(folder: Path, task: Task, sizes: BaseSizes, about: dict[str, Any]) -> None:
    """Check and write the files, train the base model, and say what is there."""
    console = Console()
    check_splits(task.splits)
    console.rule("1. Files")
    for name, rows in task.files.items():
        write_rows(folder / f"{name}.jsonl", rows)
        console.print(f"{len(rows):>7} rows  {folder}/{name}.jsonl")

    console.rule("2. Base model")
    started = time.perf_counter()
    tokenizer, seconds = train_base(
        folder / "base", [row["text"] for row in task.files["pretrain"]], sizes, about["seed"]
    )
    for name, rows in task.files.items():
        check_boundary(name, filter(is_document, rows), tokenizer)
    write_about(folder, task, {**about, "base": asdict(sizes), "base_training_seconds": round(seconds, 1)})
    console.print(f"{folder}/base is trained, in {time.perf_counter() - started:.0f} s.")


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
    return parser


if __name__ == "__main__":
    sys.exit(main())
