"""The results as a table on the screen, as JSON and CSV, and as a plot."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..artifacts import METRICS

COLORS = {"base": "tab:gray", "sft": "tab:blue", "ebft": "tab:orange"}


def require_matplotlib() -> None:
    """Fail before the work, not after it.

    Raises:
        ValueError: matplotlib, an optional extra, is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the quickstart draws a plot and needs matplotlib: pip install 'ebft[plot]'")


def save_results(folder: Path, rows: list[dict[str, Any]], **other: Any) -> None:
    """Write results.json (everything) and results.csv (the numbers, a line each)."""
    (folder / "results.json").write_text(json.dumps({**other, "results": rows}, indent=1), encoding="utf-8")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show_numbers(console: Console, rows: list[dict[str, Any]], names: list[str], title: str) -> None:
    """A table with one column per model (or pair), one row per number, intervals below the means."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    cells: dict[str, list[Text]] = {}
    for row in (row for name in names for row in rows if row["model"] == name):
        cells.setdefault(label(row), []).append(cell(row))
    for name, line in cells.items():
        table.add_row(name, *line)
    console.print(table)


def label(row: dict[str, Any]) -> str:
    """What a number is, in words."""
    return "cross-entropy" if row["measure"] == "cross_entropy" else f"FM loss at {row['length']}"


def cell(row: dict[str, Any]) -> Text:
    """Mean, and the interval below it."""
    return Text.assemble(f"{row['mean']:.4f}\n", (f"[{row['low']:.4f}, {row['high']:.4f}]", "dim"))


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
    curves = [row for row in rows if row["measure"] == "feature_matching_loss"]
    for name in ("base", "sft", "ebft"):
        draw_curve(axes[0, 0], curves, name, COLORS[name])
    for name in ("sft", "ebft"):
        draw_curve(axes[0, 1], curves, f"{name} - base", COLORS[name])
        draw_training(axes[1, 0], folder, name, "ce_loss")
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


def draw_curve(axis: Any, rows: list[dict[str, Any]], name: str, color: str) -> None:
    """Means over the completion length, with the intervals as a band."""
    rows = [row for row in rows if row["model"] == name]
    lengths, mean, low, high = ([row[key] for row in rows] for key in ("length", "mean", "low", "high"))
    axis.plot(lengths, mean, marker="o", markersize=3, label=name, color=color)
    axis.fill_between(lengths, low, high, alpha=0.15, color=color, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("completion length, tokens")


def draw_training(axis: Any, folder: Path, name: str, metric: str) -> None:
    """One metric of each step of a run, measured before the step, on documents the model has not seen."""
    lines = (folder / name / METRICS).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if metric in record]
    axis.plot([r["step"] for r in records], [r[metric] for r in records], marker=".", label=name, color=COLORS[name])
    axis.set_xlabel("step")
