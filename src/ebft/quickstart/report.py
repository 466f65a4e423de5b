"""Continuations as tables on the screen, and curves of measurements and trainings as a plot."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..artifacts import METRICS
from ..evaluation.report import band, length_axis, rows_of

COLORS = {"base": "tab:gray", "sft": "tab:blue", "ebft": "tab:orange"}


def show_continuations(console: Console, continuations: list[dict[str, str]]) -> None:
    """For each prompt its end, the text that stands there, and what each model writes instead."""
    for written in continuations:
        table = Table(box=box.SIMPLE_HEAD, show_lines=True)
        table.add_column("prompt")
        table.add_column(Text(written["prompt"].strip("\n")))
        for name, text in written.items():
            if name != "prompt":
                table.add_row(name, Text(text.rstrip()))
        console.print(table)


def plot(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Feature-matching curves, their differences from the base model, and the trainings, as curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    curves = {
        model: rows_of(rows, model, "feature_matching_loss") for model in dict.fromkeys(r["model"] for r in rows)
    }
    for name in ("base", "sft", "ebft"):
        band(axes[0, 0], curves[name], name, COLORS[name], marker=".")
    for name in ("sft", "ebft"):
        band(axes[0, 1], curves[f"{name} - base"], f"{name} - base", COLORS[name], marker=".")
        draw_training(axes[1, 0], folder, name, "ce_loss")
    for axis in axes[0, :2]:
        length_axis(axis, [row["length"] for row in curves["base"]])
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    draw_training(axes[0, 2], folder, "base", "ce_loss")
    draw_training(axes[1, 1], folder, "ebft", "feature_matching_loss")
    draw_training(axes[1, 2], folder, "ebft", "entropy")
    titles = {
        "Held-out feature-matching loss": axes[0, 0],
        "The same, paired difference from base": axes[0, 1],
        "Base in training: cross-entropy": axes[0, 2],
        "In training, same documents: cross-entropy": axes[1, 0],
        "In training: feature-matching loss (8 tokens)": axes[1, 1],
        "In training: entropy of the rollouts, nats": axes[1, 2],
    }
    for title, axis in titles.items():
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend()
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_training(axis: Any, folder: Path, name: str, metric: str) -> None:
    """One metric of each step of a run, measured before the step, on documents the model has not seen."""
    lines = (folder / name / METRICS).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if metric in record]
    axis.plot([r["step"] for r in records], [r[metric] for r in records], marker=".", label=name, color=COLORS[name])
    axis.set_xlabel("step")
