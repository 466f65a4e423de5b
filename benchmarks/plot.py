"""Plots of a run: seconds by stage and arm, and cost against the sizes that were swept, the counted work beside it."""

import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COLOURS = {"published": "tab:red", "ours": "tab:blue", "ours_reused": "navy", "sft": "tab:green"}
LABELS = {"max_length": "document tokens P", "num_generations": "rollouts n", "completion_length": "block tokens G"}


def can_plot() -> bool:
    """Whether matplotlib is there; it is optional."""
    return find_spec("matplotlib") is not None


def draw(path: Path, settings: list[dict[str, Any]], sweeps: dict[str, list[dict[str, Any]]]) -> None:
    """One panel for the settings, one per sweep.

    Args:
        path: Of the picture.
        settings: Rows of `report.rows_of`.
        sweeps: By the swept size: rows of whole updates.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [6.0, *(4.0 for _ in sweeps)]
    options: dict[str, Any] = {"width_ratios": widths, "figsize": (sum(widths), 4), "squeeze": False}
    figure, panels = pyplot.subplots(1, len(widths), **options)
    _bars(panels[0, 0], settings)
    for panel, (name, rows) in zip(panels[0, 1:], sweeps.items(), strict=True):
        _curves(panel, name, rows)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(panel, rows: list[dict[str, Any]]) -> None:
    places = list(dict.fromkeys((row["group"], row["arm"]) for row in rows))
    heights = [0.0] * len(places)
    for stage, shade in zip(("sampling", "features", "rewards", "update"), (0.9, 0.65, 0.45, 0.3), strict=True):
        found = {(r["group"], r["arm"]): r["seconds"] for r in rows if r["stage"] == stage}
        values = [found.get(place, 0.0) for place in places]
        colours = [COLOURS[arm] for _, arm in places]
        panel.bar(range(len(places)), values, bottom=heights, color=colours, alpha=shade, edgecolor="white")
        heights = [a + b for a, b in zip(heights, values, strict=True)]
    names = [f"{group}\n{arm}" for group, arm in places]
    panel.set_xticks(range(len(places)), names, fontsize=7, rotation=45)
    panel.set_ylabel("seconds per update")
    panel.set_title("stages from below: sampling, features, rewards, update", fontsize=8)


def _curves(panel, name: str, rows: list[dict[str, Any]]) -> None:
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        x = [row[name] for row in mine]
        middle, low, high = (
            [row[key] / row["batch"] for row in mine] for key in ("seconds", "seconds_min", "seconds_max")
        )
        errors = [
            [m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        panel.errorbar(x, middle, errors, color=COLOURS[arm], marker="o", capsize=3, label=f"{arm}, measured")
        # Counted work has no seconds of its own: it is laid through the middle of the measured curve.
        price = statistics.median(m / row["token_forwards"] for m, row in zip(middle, mine, strict=True))
        counted = [price * row["token_forwards"] for row in mine]
        panel.plot(x, counted, color=COLOURS[arm], linestyle="--", label=f"{arm}, counted token-forwards")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(LABELS.get(name, name))
    panel.set_ylabel("seconds per document")
    panel.legend(fontsize=7)
