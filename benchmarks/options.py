"""Does the loss curve stay what it was? `python -m benchmarks.options [--steps 200] [--device cuda]`.

Trains a tiny model on Python source, once as by default in float32 and once with each option of memory or speed, from
the same weights, documents and noise; compares the held-out cross-entropy along the way. Another seed's run says how
much is little.
"""

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tiny_runs import SETTINGS, model, tokenizer
from ebft import EBFTConfig, EBFTTrainer

LENGTH, DOCUMENTS, HELD_OUT = 48, 400, 40
# With a larger rate or without cross-entropy, rounding alone grows to as much as another seed's difference.
STEADY: dict[str, Any] = dict(learning_rate=1e-3, ce_coef=0.3)
CHECKPOINTED: dict[str, Any] = dict(gradient_checkpointing=True)
# Settings, and how far the cross-entropy may be from the default's, in nats per token.
OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "two forwards": (dict(reuse_sampling_forward=False), 0.001),
    "gradient checkpointing": (CHECKPOINTED, 0.001),
    "torch.compile": (dict(torch_compile=True), 0.001),
    "bfloat16": (dict(bf16=True), 0.05),
}
ON_GPUS: dict[str, tuple[dict[str, Any], float]] = {
    "offloading": (CHECKPOINTED | dict(activation_offloading=True), 0.001),
    "Liger": (dict(use_liger_kernel=True), 0.001),
    "TF32": (dict(tf32=True), 0.01),
}


def documents() -> tuple[Dataset, Dataset]:
    """Pieces of the source of `argparse`, byte by byte; what is held out comes from its end."""
    encode, text = tokenizer(), inspect.getsource(argparse)
    ids = encode(text)["input_ids"]
    rows = [{"input_ids": ids[first : first + LENGTH]} for first in range(0, len(ids) - LENGTH, LENGTH)]
    return Dataset.from_list(rows[:DOCUMENTS]), Dataset.from_list(rows[-HELD_OUT:])


def curve(folder: Path, steps: int, evaluations: int, **settings: Any) -> list[float]:
    """Held-out cross-entropy of the documents' tokens, in nats, along one run."""
    every = max(1, steps // evaluations)
    options: dict[str, Any] = SETTINGS | dict(max_length=LENGTH, per_device_train_batch_size=4)
    options |= dict(eval_strategy="steps", eval_steps=every)
    options |= dict(eval_on_start=True, bf16=False, save_strategy="no", logging_strategy="no") | STEADY | settings
    train, held_out = documents()
    args = EBFTConfig(output_dir=str(folder), max_steps=steps, **options)
    ours = EBFTTrainer(model(), args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer())
    ours.train()
    return [row["eval_ce_loss"] for row in ours.state.log_history if "eval_ce_loss" in row]


def measure(names: Iterable[str], steps: int, evaluations: int = 10, use_cpu: bool = True) -> dict[str, list[float]]:
    """The curves of the default, of another seed, and of the named options."""
    known = {"default": ({}, 0.0), "another seed": (dict(seed=1, data_seed=1), 0.0)} | OPTIONS | ON_GPUS
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: curve(Path(folder) / name.replace(" ", "_"), steps, evaluations, use_cpu=use_cpu, **known[name][0])
            for name in ("default", "another seed", *names)
        }


def furthest(one: list[float], other: list[float]) -> float:
    """The largest distance of two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if an option is further from the default than it may."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.options", description="Loss curves with each option.")
    p.add_argument("--steps", type=int, default=200, help="of the optimiser")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where; a GPU has more options")
    p.add_argument("--json", type=Path, help="write the curves there")
    args = p.parse_args(argv)
    if args.steps < 10:
        p.error(f"steps={args.steps} must be at least 10.")
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"device={args.device}: there is none here.")
    options = OPTIONS if args.device == "cpu" else OPTIONS | ON_GPUS
    curves = measure(options, args.steps, use_cpu=args.device == "cpu")
    table = Table(box=box.SIMPLE_HEAD, title=f"held-out cross-entropy, {args.steps} steps, nats per token")
    for column in ("", "before", "at the end", "furthest from the default's", "allowed"):
        table.add_column(column, justify="right" if column else "left")
    distances = {name: furthest(found, curves["default"]) for name, found in curves.items()}
    for name, found in curves.items():
        allowed = f"{options[name][1]:.3f}" if name in options else ""
        table.add_row(name, f"{found[0]:.4f}", f"{found[-1]:.4f}", f"{distances[name]:.5f}", allowed)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "curves": curves}))
    return int(any(distances[name] > tolerance for name, (_, tolerance) in options.items()))


if __name__ == "__main__":
    sys.exit(main())
