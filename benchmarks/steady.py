"""Watches a long run of a tiny model: `python -m benchmarks.steady --steps 2000`.

Memory of the process (and of a GPU), open files, seconds of a step and of waiting for data, step by step; behind a
warm-up, the slope of each by least squares. The run evaluates and saves as long runs do. With --stream its documents
come from a file that is never in memory as a whole.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import linregress
from transformers import TrainerCallback

from benchmarks.tiny_runs import SETTINGS, model, tokenizer, trainer
from ebft import EBFTConfig, EBFTTrainer
from ebft.data import load_documents, tokenize_documents

MIB = 2**20
RUN: dict[str, Any] = dict(save_total_limit=2, eval_strategy="steps", gradient_accumulation_steps=1)


class Watch(TrainerCallback):
    """Reads the process's figures behind every step."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.rows: list[dict[str, float]] = []
        self.waited = 0.0
        self._began = self._worked = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began, self._worked = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        row = {
            "step": state.global_step,
            "resident, MiB": self.process.memory_info().rss / MIB,
            "open files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "step, ms": 1e3 * (time.perf_counter() - self._began),
            "CPU in a step, ms": 1e3 * (time.process_time() - self._worked),  # whatever else the machine does
            "waiting for data, ms": 1e3 * self.waited,
        }
        if torch.cuda.is_available() and not args.use_cpu:
            row["allocated on the GPU, MiB"] = torch.cuda.memory_allocated() / MIB
        self.rows.append(row)


def watched(ours: EBFTTrainer) -> Watch:
    """Have a trainer watched, the fetching of its batches included."""
    watch, trained = Watch(), cast(Any, ours)
    fetch = trained.get_batch_samples
    ours.add_callback(watch)

    def timed(*args: Any):
        began = time.perf_counter()
        batches = fetch(*args)
        watch.waited = time.perf_counter() - began
        return batches

    trained.get_batch_samples = timed
    return watch


def slope(rows: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Change of a figure per 1,000 steps, and its 95 % half-width, by least squares over the steps."""
    values = [row[name] for row in rows]
    if len(set(values)) == 1:
        return 0.0, 0.0
    fit: Any = linregress([row["step"] for row in rows], values)
    return 1e3 * fit.slope, 1.96 * 1e3 * fit.stderr


def summary(rows: list[dict[str, float]], warmup: int) -> list[dict[str, Any]]:
    """Of each figure, behind the warm-up: medians of the first and last tenth, and the slope."""
    rows = [row for row in rows if row["step"] > warmup]
    tenth = max(1, len(rows) // 10)
    out = []
    for name in rows[0].keys() - {"step"}:
        first, last = (float(np.median([row[name] for row in part])) for part in (rows[:tenth], rows[-tenth:]))
        change, error = slope(rows, name)
        out.append({"figure": name, "first": first, "last": last, "per_1000_steps": change, "error": error})
    return sorted(out, key=lambda row: row["figure"])


def write_rows(path: Path, size: int, characters: int = 30) -> None:
    """Documents of so many random letters, the same few again and again, until the file has `size` bytes."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
    generator = np.random.default_rng(0)
    text = letters[generator.integers(len(letters), size=(max(1, 30_000 // characters), characters))]
    rows = b"".join(b'{"text": "' + row.tobytes() + b'"}\n' for row in text)
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(rows)


def streamed(path: Path, folder: Path, steps: int, **settings: Any) -> EBFTTrainer:
    """A trainer whose documents are read from a file while it trains."""
    options: dict[str, Any] = SETTINGS | settings | {"eval_strategy": "no"}
    args = EBFTConfig(output_dir=str(folder), max_steps=steps, **options)
    rows = load_documents(str(path), streaming=True)
    return EBFTTrainer(model(), args, train_dataset=rows, processing_class=tokenizer())


def read(path: Path, every: int = 1000) -> list[dict[str, float]]:
    """Tokenise a streamed file to its end, without training on it; the process's memory along the way."""
    process, rows = psutil.Process(), []
    documents = tokenize_documents(load_documents(str(path), streaming=True), tokenizer(), max_length=4096)
    for count, _ in enumerate(documents, 1):
        if count % every == 0:
            rows.append({"step": count, "resident, MiB": process.memory_info().rss / MIB})
    return rows


def rows_of_run(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """What was watched, of a run as the command line asks for it."""
    every, file = max(1, args.steps // 20), folder / "rows.jsonl"
    settings: dict[str, Any] = RUN | {"save_steps": every, "eval_steps": every, "use_cpu": args.device == "cpu"}
    if args.stream:
        write_rows(file, int(args.stream * MIB), args.characters)
    if args.read:
        return read(file)
    if args.stream:
        ours = streamed(file, folder / "run", args.steps, **settings)
    else:
        ours = trainer(args.kind, folder / "run", args.steps, **settings)
    watch = watched(ours)
    ours.train()
    return watch.rows


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.steady", description="Watches a long run.")
    p.add_argument("--steps", type=int, default=2000, help="of the optimiser")
    p.add_argument("--warmup", type=int, help="steps left out of the slopes; default: a fifth")
    p.add_argument("--kind", default="full", choices=("full", "lora"), help="of run")
    p.add_argument("--stream", type=float, metavar="MIB", help="stream documents from a file of this size instead")
    p.add_argument("--characters", type=int, default=30, help="of a row of that file")
    p.add_argument("--read", action="store_true", help="of the stream, tokenise all in place of training on some")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where")
    p.add_argument("--json", type=Path, help="write every step there")
    return p


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train or read, watch, print; returns the rows of the table."""
    args = (p := parser()).parse_args(argv)
    warmup = args.steps // 5 if args.warmup is None else args.warmup
    if not 0 <= warmup < args.steps - 10:
        p.error(f"warmup={warmup} leaves fewer than 10 of {args.steps} steps.")
    if args.read and not args.stream:
        p.error("read: there is no stream to be read; give --stream MIB.")
    with tempfile.TemporaryDirectory() as name:
        rows = rows_of_run(args, Path(name))
    if args.read:  # a step is a document
        warmup = int(rows[len(rows) // 5]["step"])
    found = summary(rows, warmup)
    table = Table(box=box.SIMPLE_HEAD, title=f"steps {warmup + 1} to {rows[-1]['step']:.0f}")
    for column in ("", "first tenth", "last tenth", "per 1,000 steps"):
        table.add_column(column, justify="right" if column else "left")
    for row in found:
        change = f"{row['per_1000_steps']:+.3f} +- {row['error']:.3f}"
        table.add_row(row["figure"], f"{row['first']:.2f}", f"{row['last']:.2f}", change)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if args.json:
        args.json.write_text(json.dumps({"steps": rows, "summary": found}))
    return found


if __name__ == "__main__":
    main()
