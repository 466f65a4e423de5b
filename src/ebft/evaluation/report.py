"""The numbers of an evaluation as JSON and CSV, as tables on the screen, and as plots."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..locks import is_locked, lock
from .records import RECORDS, check_same
from .settings import BY_POSITION
from .summary import Row

RESULTS, NUMBERS, PLOTS, LOCK = "results.json", "results.csv", "plots", ".evaluation.lock"
PLACES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of which the tables show a position's numbers
ROUNDING = 1e-12
FLOOR, SHARED = "feature_matching_floor", "feature_matching_shared"
# How the measures of documents begin.
IN_WORDS = ("cross_entropy", "perplexity", "feature_matching", "entropy", "duplicate_rate", "distinct", "self_bleu")
ADDED = (
    f"choose another folder, or delete it. To add a model, a benchmark or a k, delete {RESULTS} alone: the records "
    "stay, and only what is new is measured."
)
CAME_LATER = {"kernels": []}  # settings, as they were in results from before there were any
NOT_OF_THE_RESULTS = ("output_dir", "plots", "batch_size", "device", "vllm_gpu_memory_utilization")


def check_folder(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that holds the results of another evaluation: they would be overwritten.

    Raises:
        ValueError: Something else has the name of what is written, or names the settings that differ.
    """
    for name, there in (
        *((name, (folder / name).is_dir()) for name in (RESULTS, NUMBERS)),
        *((name, (folder / name).is_file()) for name in (RECORDS, PLOTS)),
    ):
        if there:
            raise ValueError(f"output_dir: {folder / name} is in the way of what is written: rename or delete it.")
    if (folder / RESULTS).exists():
        try:
            before = {**CAME_LATER, **json.loads((folder / RESULTS).read_text(encoding="utf-8"))["config"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"output_dir: {folder / RESULTS} holds no results of an evaluation ({error!r}): delete it, what is "
                "measured stays in the folder's records."
            ) from error
        now = json.loads(json.dumps(config))
        ignored = _without_effect(now)
        old, new = ({k: v for k, v in x.items() if k not in ignored} for x in (before, now))
        check_same(old, new, folder, ADDED)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep it for this call: two would both measure what is missing and write it twice.

    Raises:
        ValueError: It cannot be made or written to, or another call has it.
    """
    held = lock(folder, LOCK, "ebft evaluate")
    try:
        yield
    finally:
        held.release()


def is_at_work(folder: Path) -> bool:
    """Whether an evaluation has the folder at this moment."""
    return is_locked(folder, LOCK)


def _without_effect(config: dict[str, Any]) -> tuple[str, ...]:
    """Settings that results do not depend on; on the batch only transformers' sampling does, for its noise."""
    sampling = max(config["num_samples"], config["best_of"]) > 1 and config["generation_engine"] == "transformers"
    return NOT_OF_THE_RESULTS if sampling else (*NOT_OF_THE_RESULTS, "generation_batch_size")


def save(folder: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write results.json (everything; null where a task's score is infinite or NaN) and results.csv (the numbers)."""
    numbers = [{k: v if not isinstance(v, float) or isfinite(v) else None for k, v in row.items()} for row in rows]
    text = json.dumps({**about, "results": numbers}, indent=1, allow_nan=False)
    unfinished = folder / f"{RESULTS}.unfinished"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(folder / RESULTS)  # never half of it
    with open(folder / NUMBERS, "w", newline="", encoding="utf-8") as file:
        columns = ["model", "measure", "length", "mean", "low", "high", "units", "p_value"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def show(console: Console, rows: Sequence[Row], names: Sequence[str], title: str) -> None:
    """A table with one column per model (or pair), one line per number, intervals below the means."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    cells: dict[str, dict[str, Text]] = {}
    for row in rows:
        if row["model"] in names and (row["length"] is None or row["length"] in PLACES):
            cells.setdefault(label(row), {})[row["model"]] = _cell(row)
    for text, line in cells.items():
        table.add_row(Text(text), *(line.get(name, Text("-")) for name in names))
    console.print(table)


def label(row: Row) -> str:
    """What a number is, in words; benchmarks and tasks keep their names."""
    name = row["measure"].replace("/", ", ")
    if name.startswith(IN_WORDS):
        name = name.replace("_", " ")
    if row["length"] is None:
        return name
    return f"{name}, token {row['length']}" if row["measure"] in BY_POSITION else f"{name}, length {row['length']}"


def in_digits(value: float, form: str = ".4g") -> str:
    """A number as people read it: what is nothing but rounding errors is 0."""
    return format(0.0 if abs(value) < ROUNDING else value, form)


def _cell(row: Row) -> Text:
    """Mean, and below it the interval, or the p-value of a paired bootstrap."""
    below = f"[{in_digits(row['low'])}, {in_digits(row['high'])}]" if row["low"] is not None else ""
    if row.get("units") == 1:
        below = "of one"  # the bootstrap of a single document or problem has no width and would look exact
    if row.get("p_value") is not None:
        below = f"p = {row['p_value']:.2g}"
    return Text.assemble(f"{in_digits(row['mean'])}\n", (below, "dim"))


def plot(folder: Path, rows: Sequence[Row], names: Sequence[str]) -> list[Path]:
    """Curves by length and by position and bars of single numbers, whatever was measured; as PNG and SVG.

    Returns:
        The PNG files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (folder / PLOTS).mkdir(exist_ok=True)
    made = []
    for name, draw in (("feature_matching", _curves), ("calibration", _calibration), ("scores", _bars)):
        figure = draw(plt, rows, names)
        if figure is None:
            continue
        for suffix in ("png", "svg"):
            figure.savefig(folder / PLOTS / f"{name}.{suffix}", dpi=110)
        plt.close(figure)
        made.append(folder / PLOTS / f"{name}.png")
    return made


def rows_of(rows: Sequence[Row], name: str, measure: str) -> list[Row]:
    """The numbers of one measure of one model, or pair."""
    return [row for row in rows if row["model"] == name and row["measure"] == measure]


def band(axis: Any, rows: list[Row], name: str, color: str, **style: Any) -> None:
    """Means over length, with the intervals as a band."""
    if not rows:
        return
    x, mean, low, high = ([row[key] for row in rows] for key in ("length", "mean", "low", "high"))
    axis.plot(x, mean, label=name, color=color, markersize=3, **style)
    axis.fill_between(x, low, high, alpha=0.15, color=color, linewidth=0)


def _curves(plt: Any, rows: Sequence[Row], names: Sequence[str]) -> Any:
    """Feature-matching loss of each model, and differences from the first.

    Where prompts have several references also, dotted, the loss behind those prompts, which alone has a floor.
    """
    measure = "feature_matching_loss"
    if not any(row["measure"] == measure for row in rows):
        return None
    several = len(names) > 1
    figure, axes = plt.subplots(1, 2 if several else 1, figsize=(11 if several else 6, 4), layout="constrained")
    left = axes[0] if several else axes
    for i, name in enumerate(names):
        band(left, rows_of(rows, name, measure), name, f"C{i}", marker="o")
        shared = rows_of(rows, name, SHARED)
        prompts = f", {shared[0]['units']} prompts with several references" if shared else ""
        band(left, shared, f"{name}{prompts}", f"C{i}", linestyle=":")
        if several and i:
            band(axes[1], rows_of(rows, f"{name} - {names[0]}", measure), f"{name} - {names[0]}", f"C{i}", marker="o")
    band(left, rows_of(rows, names[0], FLOOR), "variance of those references: the floor", "black", linestyle="--")
    left.set_title("Held-out feature-matching loss")
    if several:
        axes[1].set_title("The same, paired difference")
        axes[1].axhline(0, color="black", linewidth=0.8)
    lengths = sorted({row["length"] for row in rows if row["measure"] == measure})
    for axis in axes if several else [axes]:
        length_axis(axis, lengths)
        _finish(axis)
    return figure


def _calibration(plt: Any, rows: Sequence[Row], names: Sequence[str]) -> Any:
    """For each model, entropy of the k-th token it writes beside cross-entropy and entropy on the reference text."""
    if not any(row["measure"] == "entropy/rollout" for row in rows):
        return None
    figure, axes = plt.subplots(
        1, len(names), figsize=(5 * len(names) + 1, 4), layout="constrained", sharey=True, squeeze=False
    )
    lines = {
        "entropy/rollout": ("entropy of what it writes", "C0", "-"),
        "cross_entropy/reference": ("cross-entropy on the text", "C1", "-"),
        "entropy/reference": ("entropy on the text", "C2", "--"),
    }
    for axis, name in zip(axes[0], names, strict=True):
        for measure, (text, color, style) in lines.items():
            band(axis, rows_of(rows, name, measure), text, color, linestyle=style)
        axis.set_title(_wrapped(name, 40))
        axis.set_xlabel("token of the completion")
        _finish(axis)
    axes[0][0].set_ylabel("nats")
    return figure


def _bars(plt: Any, rows: Sequence[Row], names: Sequence[str]) -> Any:
    """Single numbers, each on a scale of its own, with their intervals."""
    measures = list(dict.fromkeys(row["measure"] for row in rows if row["length"] is None and row["model"] in names))
    if not measures:
        return None
    across = min(4, len(measures))
    down = -(-len(measures) // across)
    longest = max(map(len, names))  # names stand below each axis, at 8 points
    size = 3.2 * across, (1.9 + 0.055 * min(longest, 40)) * down + 0.6
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis, measure in zip(axes.flat, measures, strict=False):
        for i, name in enumerate(names):
            for row in rows_of(rows, name, measure):
                known = row["low"] is not None
                ends = (row["mean"] - row["low"], row["high"] - row["mean"]) if known else (0.0, 0.0)
                spread = [[max(0.0, end)] for end in ends]
                axis.errorbar([i], [row["mean"]], yerr=spread, fmt="o", color=f"C{i}", capsize=4)
        axis.set_title(_wrapped(label({"measure": measure, "length": None}), 28), fontsize=9)
        shown = [_wrapped(name, 40) for name in names]
        axis.set_xticks(range(len(names)), shown, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_xlim(-0.5, len(names) - 0.5)
        if axis.get_ylim()[0] < 0 and all(row["mean"] >= 0 for name in names for row in rows_of(rows, name, measure)):
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(measures) :]:
        axis.axis("off")
    return figure


def _wrapped(text: str, width: int) -> str:
    """Lines of at most so many characters; a longer word, such as a file's name, is broken."""
    return "\n".join(wrap(text, width))


def length_axis(axis: Any, lengths: Sequence[int]) -> None:
    """Completion lengths along the x axis, each doubling as wide as the next."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("completion length, tokens")


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
