"""How much of an update's gradient is signal: `python -m benchmarks.gradient_signal --model_name_or_path M ...`.

Gradients of many updates at the same weights, each of documents of its own, for SFT and for EBFT's ways of rewarding.
With g_1..g_M their flattened gradients, the mean of g_i . g_j over i != j estimates ||E g||^2 without bias, and what
the mean of g_i . g_i has beyond it is noise. Options that are not its own are those of `ebft train`.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from ebft.cli.arguments import parse
from ebft.cli.train import build_trainer
from ebft.config import EBFTConfig

SFT = "SFT"
BATCHES = 4  # whose rollouts' noise is measured
ARMS = {
    SFT: ["--rl_coef", "0", "--ce_coef", "1"],
    **{f"EBFT, whitening {kind}": ["--ce_coef", "0", "--whitening", kind] for kind in ("none", "paper", "released")},
}
# The weights stay where they are: float32 does not notice a step of this size.
STILL = ["--optim", "sgd", "--learning_rate", "1e-30", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
QUIET = ["--save_strategy", "no", "--rollout_save_steps", "0", "--report_to", "none", "--disable_tqdm", "true"]
QUIET += ["--logging_strategy", "no"]


class Gradients(TrainerCallback):
    """Keeps the gradient of every update, flattened."""

    def __init__(self, bar: tqdm) -> None:
        self.rows: list[Tensor] = []
        self.bar = bar

    def on_pre_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        """Copy it, before the step."""
        parts = [p.grad.detach().flatten().float().cpu() for p in model.parameters() if p.grad is not None]
        self.rows.append(torch.cat(parts))
        self.bar.update()


def gradients(words: list[str], updates: int, again: bool = False) -> Tensor:
    """Gradients [updates, parameters] of a training that goes nowhere.

    Args:
        words: Options of `ebft train`.
        updates: How many.
        again: Documents may come again.

    Raises:
        ValueError: Some would, and `again` is False: their gradients would not be independent.
    """
    with tempfile.TemporaryDirectory() as folder, tqdm(total=updates, desc="gradients", leave=False) as bar:
        kept = Gradients(bar)
        run = ["--max_steps", str(updates), "--output_dir", folder, "--max_grad_norm", "0"]
        arguments = parse([*words, *run, *STILL, *QUIET])
        trainer: Any = build_trainer(arguments)
        needed, there = updates * documents_of(arguments.training), len(trainer.train_dataset)
        if needed > there and not again:
            raise ValueError(f"--updates {updates} take {needed} documents, of which there are {there}: lower it.")
        trainer.add_callback(kept)
        trainer.train()
    return torch.stack(kept.rows)


def documents_of(training: EBFTConfig) -> int:
    """Documents of one update."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def between(products: Tensor) -> Tensor:
    """Mean of what is off the diagonal of [M, M]."""
    count = len(products)
    return (products.sum() - products.trace()) / (count * (count - 1))


def signal_to_noise(products: Tensor) -> Tensor:
    """||E g||^2 over the trace of the covariance, of one update."""
    signal = between(products)
    return signal / (products.diagonal().mean() - signal)


def cosine(own: Tensor, other: Tensor, cross: Tensor) -> Tensor:
    """Of two mean gradients, from products of different updates only."""
    return between(cross) / (between(own).clamp_min(0) * between(other).clamp_min(0)).sqrt()


def with_error(statistic: Callable[..., Tensor], *matrices: Tensor) -> tuple[float, float]:
    """A statistic of Gram matrices [M, M], and its jackknife standard error over updates."""
    count = len(matrices[0])
    others = [[j for j in range(count) if j != i] for i in range(count)]
    without = torch.stack([statistic(*(m[rest][:, rest] for m in matrices)) for rest in others])
    error = ((without - without.mean()) ** 2).sum() * (count - 1) / count
    return float(statistic(*matrices)), float(error.sqrt())


def measure(words: list[str], updates: int, batch: int) -> list[dict[str, Any]]:
    """One row per way of training.

    Args:
        words: Options of `ebft train`.
        updates: How many gradients of each.
        batch: Documents per update.
    """
    rows: list[dict[str, Any]] = []
    sft: Tensor | None = None
    for name, extra in ARMS.items():
        found = gradients([*words, *extra], updates).double()
        sft = found if sft is None else sft
        own = found @ found.T
        ratio, error = with_error(signal_to_noise, own)
        row = {"arm": name, "signal": math.sqrt(max(float(between(own)), 0.0)), "ratio": ratio, "ratio_error": error}
        row["documents"] = batch / ratio if ratio > 0 else math.inf
        row["cosine"], row["cosine_error"] = with_error(cosine, own, sft @ sft.T, found @ sft.T)
        noise = float(own.diagonal().mean() - between(own))
        share = (0.0, 0.0) if name == SFT else of_the_same([*words, *extra], updates, batch)
        row["rollouts"], row["rollouts_error"] = share[0] / noise, share[1] / noise
        rows.append(row)
    return rows


def of_the_same(words: list[str], updates: int, batch: int) -> tuple[float, float]:
    """Noise that stays when all updates have the same documents, so that it comes from sampling rollouts.

    Returns:
        Its mean over `BATCHES` batches, and the standard error of that mean.
    """
    arguments, noises = parse(words), []
    each = max(4, updates // BATCHES)
    with open(arguments.data.dataset_name, encoding="utf-8") as lines:
        for _ in range(BATCHES):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "same.jsonl"
                path.write_text("".join(islice(lines, batch)), encoding="utf-8")
                found = gradients([*words, "--dataset_name", str(path)], each, again=True).double()
            products = found @ found.T
            noises.append(products.diagonal().mean() - between(products))
    found = torch.stack(noises)
    return float(found.mean()), float(found.std() / BATCHES**0.5)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What was measured, to look at."""
    title = "Signal and noise of an update's gradient, by whitening; +- standard errors"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    columns = (
        "",
        "mean's\nnorm",
        "signal /\nnoise",
        "texts\nfor 1",
        "cosine\nwith SFT's",
        "noise from\nrollouts",
    )
    for column in columns:
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["arm"].replace("whitening ", ""),
            f"{row['signal']:.3g}",
            f"{row['ratio']:.2g} +- {row['ratio_error']:.1g}",
            f"{row['documents']:.3g}",
            f"{row['cosine']:.2f} +- {row['cosine_error']:.1g}",
            f"{row['rollouts']:.0%} +- {row['rollouts_error']:.0%}",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure, show, and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_signal", description=__doc__)
    parser.add_argument("--updates", type=int, default=32, help="gradients of each kind; at least 4")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    own, words = parser.parse_known_args(argv)
    if own.updates < 4:
        parser.error(f"argument --updates: got {own.updates}; give at least 4")
    training = parse(words).training
    rows = measure(words, own.updates, documents_of(training))
    Console().print(table(rows))
    if own.json:
        own.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
