"""The numbers of every figure: lines with bands over training, and over completion length."""

from collections.abc import Callable, Sequence
from typing import Any

from .comparison import Comparison, at_each_part, at_the_end, measures_of, methods_of
from .files import Record, is_number
from .sources import Group, Sources
from .statistics import over_seeds

Panel = dict[str, Any]
Line = dict[str, Any]

AXES = ("documents", "step", "seconds")
MOST_POINTS = 1500  # of a line; more cannot be told apart on a screen
TRAINED_LENGTH = 8  # the completion length of the paper's figure, shown if it was measured
LOSS = "feature_matching_loss"
TRAINING_STYLE = 2  # dotted, in figures.js
BASE = "base"  # the method that is what all others start from

# Title, unit, metric; the parts of the reward and what else tells how training goes.
REWARD_PANELS = (
    ("Alignment, unwhitened", "inner product", "rewards/alignment_unwhitened/mean"),
    ("Diversity term, unwhitened", "inner product", "rewards/diversity_unwhitened/mean"),
    ("Alignment, as rewarded", "reward", "rewards/alignment/mean"),
    ("Diversity term, as rewarded", "reward", "rewards/diversity/mean"),
    ("Spread of rewards within a group", "standard deviation", "reward_std"),
    ("Groups without spread", "share", "frac_reward_zero_std"),
    ("Rollouts that repeat another", "share", "completions/duplicate_rate"),
    ("Entropy of the sampled tokens", "nats per token", "entropy"),
)
COST_PANELS = (
    ("Time per step", "seconds", "step_time"),
    ("Throughput", "tokens per second", "tokens_per_second"),
)


def training_panels(sources: Sources) -> list[Panel]:
    """The paper's figure: greedy and sampled accuracy, cross-entropy and feature-matching loss over training."""
    never = "Not measured: these runs were not evaluated on tasks while they trained."
    accuracies = [
        _panel(f"Accuracy, {kind}", "share solved, or BLEU", _accuracy_lines(sources, kind), never)
        for kind in ("greedy", "sampled")
    ]
    return [
        *accuracies,
        _panel("Cross-entropy", "nats per token", _cross_entropy_lines(sources), "No cross-entropy logged yet."),
        _panel("Feature-matching loss", "squared distance", _loss_lines(sources), "No rollouts measured yet."),
    ]


def reward_panels(sources: Sources) -> list[Panel]:
    """The parts of the reward over training."""
    return [_metric_panel(sources, *panel) for panel in REWARD_PANELS]


def cost_panels(sources: Sources) -> list[Panel]:
    """Seconds and tokens per second over training, and all seconds so far."""
    lines = []
    for index, group in enumerate(sources.groups):
        places = {id(run): run.places() for run in group.runs}
        lines += _line(group.name, index, _over_runs(group, lambda run, p=places: _seconds(run, p)))
    total = _panel("Training time so far", "seconds", lines, "No step timed yet.")
    return [*(_metric_panel(sources, *panel) for panel in COST_PANELS), total]


def length_panels(sources: Sources) -> list[Panel]:
    """Feature-matching loss by completion length: of comparisons at the end of training, and of evaluations."""
    lines: list[Line] = []
    for prefix, comparison in sources.comparisons:
        rows = [row for row in comparison.selected(comparison.final_splits()[0]) if row["measure"] == LOSS]
        for method in methods_of(rows):
            name = f"{prefix}{method}"
            mine = [row for row in rows if row["method"] == method and row["length"] is not None]
            points = [
                {"length": length, "estimate": at_the_end(row for row in mine if row["length"] == length)}
                for length in sorted({row["length"] for row in mine})
            ]
            lines += _line(name, _place(sources, name), points)
    for model, rows in sources.evaluations.items():
        curve = [row for row in rows if row.get("measure") == LOSS and is_number(row.get("length"))]
        if curve and not _is_difference(model, sources):
            lines.append(_evaluated(model, curve, sources))
    empty = "Not measured yet: ebft evaluate and ebft compare measure it."
    return [_panel("Feature-matching loss by completion length", "squared distance", lines, empty, axis="length")]


def is_accuracy(measure: str, kind: str) -> bool:
    """Whether a measure is pass@k of greedy or sampled completions."""
    return f"/{kind}/pass@" in measure and (kind == "sampled" or measure.endswith("/greedy/pass@1"))


def _accuracy_lines(sources: Sources, kind: str) -> list[Line]:
    lines: list[Line] = []
    for prefix, comparison in sources.comparisons:
        rows = comparison.selected(comparison.curve_split())
        names = dict.fromkeys(measure for measure, _ in measures_of(rows))
        chosen = [name for name in names if is_accuracy(name, kind)]
        # BLEU of one greedy translation each; of several samples, whatever is made of them.
        chosen = chosen or [name for name in names if "BLEU" in name and ("first" in name) == (kind == "greedy")]
        for style, measure in enumerate(chosen):
            of = measure.replace(f"/{kind}/", ", ")
            lines += _comparison_lines(sources, prefix, comparison, (measure, None), style, of)
    for index, group in enumerate(sources.groups):
        keys = dict.fromkeys(key for run in group.runs for record in run.records.values() for key in record)
        chosen = [key for key in keys if key.startswith("eval_") and is_accuracy(key, kind)]
        for style, key in enumerate(chosen):
            of = key.removeprefix("eval_").replace(f"/{kind}/", ", ")
            lines += _line(group.name, index, _metric(group, key), style, of)
    return lines


def _cross_entropy_lines(sources: Sources) -> list[Line]:
    lines: list[Line] = []
    for prefix, comparison in sources.comparisons:
        rows = comparison.selected(comparison.curve_split())
        measures = [m for m in ("cross_entropy/answer", "cross_entropy/all") if any(r["measure"] == m for r in rows)]
        for measure in measures[:1]:
            lines += _comparison_lines(sources, prefix, comparison, (measure, None), 0, "")
    return lines + _logged(sources, ("eval_ce_loss/answer", "eval_ce_loss/all", "eval_loss"), "ce_loss")


def _loss_lines(sources: Sources) -> list[Line]:
    lines: list[Line] = []
    for prefix, comparison in sources.comparisons:
        rows = comparison.selected(comparison.curve_split())
        lengths = {length for measure, length in measures_of(rows) if measure == LOSS and length is not None}
        if lengths:
            length = TRAINED_LENGTH if TRAINED_LENGTH in lengths else max(lengths)
            lines += _comparison_lines(sources, prefix, comparison, (LOSS, length), 0, f"length {length}")
    return lines + _logged(sources, (f"eval_{LOSS}",), LOSS)


def _logged(sources: Sources, held_out: Sequence[str], training: str) -> list[Line]:
    """Of runs by themselves: the first of the held-out metrics that there is, and dotted that of training."""
    cells = {id(run) for _, comparison in sources.comparisons for run, _ in comparison.cells}
    lines: list[Line] = []
    for index, group in enumerate(sources.groups):
        if any(id(run) in cells for run in group.runs):
            continue  # its numbers are those of the comparison's table
        measured = [points for key in held_out if (points := _metric(group, key))]
        for points in measured[:1]:
            lines += _line(group.name, index, points, of="held out")
        lines += _line(group.name, index, _metric(group, training), TRAINING_STYLE, "training")
    return lines


def _comparison_lines(
    sources: Sources, prefix: str, comparison: Comparison, measure: tuple[str, int | None], style: int, of: str
) -> list[Line]:
    lines: list[Line] = []
    rows = [r for r in comparison.selected(comparison.curve_split()) if (r["measure"], r["length"]) == measure]
    curves = {method: at_each_part([row for row in rows if row["method"] == method]) for method in methods_of(rows)}
    start = curves.get(BASE, [])
    for method, points in curves.items():
        name = f"{prefix}{method}"
        # All start from the base model, whose own line is drawn across, to compare the others with.
        if method != BASE and points[0]["step"] > 0:
            points = [*start, *points]
        drawn = _line(name, _place(sources, name), points, style, of)
        lines += [line | {"level": method == BASE} for line in drawn]
    return lines


def _place(sources: Sources, name: str) -> int | None:
    return next((index for index, group in enumerate(sources.groups) if group.name == name), None)


def _metric_panel(sources: Sources, title: str, unit: str, key: str) -> Panel:
    lines = [line for i, group in enumerate(sources.groups) for line in _line(group.name, i, _metric(group, key))]
    return _panel(title, unit, lines, f"No {key} logged yet.")


def _metric(group: Group, key: str) -> list[dict[str, Any]]:
    return _over_runs(group, lambda run: run.values(key))


def _seconds(run: Any, places: dict[int, dict[int, dict[str, float]]]) -> dict[int, float]:
    return {step: place["seconds"] for step, place in places[id(run)].items() if place["seconds"]}


def _over_runs(group: Group, values_of: Callable[[Any], dict[int, float]]) -> list[dict[str, Any]]:
    """A number at each step, over the runs of a group that have it there."""
    found = [(run.places(), values_of(run)) for run in group.runs]
    points = []
    for step in sorted({step for _, values in found for step in values}):
        here = [(places[step], values[step]) for places, values in found if step in values]
        place = {axis: sum(place[axis] for place, _ in here) / len(here) for axis in AXES}
        points.append(place | {"estimate": over_seeds([value for _, value in here])})
    return points


def _line(name: str, group: int | None, points: list[dict[str, Any]], style: int = 0, of: str = "") -> list[Line]:
    """One line, `of` what it shows; its points thinned evenly where there are too many; none without points."""
    every = -(-len(points) // MOST_POINTS) if points else 1
    points = points[::-1][::every][::-1]  # the last one stays
    if not points:
        return []
    x = {axis: [point[axis] for point in points] for axis in points[0] if axis != "estimate"}
    ends = {end: [getattr(point["estimate"], end) for point in points] for end in ("mean", "low", "high")}
    return [{"name": name, "of": of, "group": group, "style": style, "x": x, **ends}]


def _evaluated(model: str, rows: list[Record], sources: Sources) -> Line:
    rows = sorted(rows, key=lambda row: row["length"])
    ends = {end: [_number(row.get(end)) for row in rows] for end in ("mean", "low", "high")}
    x = {"length": [row["length"] for row in rows]}
    return {"name": f"{model} (evaluation)", "of": "", "group": _place(sources, model), "style": 0, "x": x, **ends}


def _number(value: Any) -> int | float | None:
    return value if is_number(value) else None


def _is_difference(model: str, sources: Sources) -> bool:
    """Whether an evaluation's row is of a pair, "A - B", which is no loss of its own."""
    left, found, right = model.partition(" - ")
    return bool(found) and {left, right} <= sources.evaluations.keys()


def _panel(title: str, unit: str, lines: list[Line], empty: str, axis: str = "training") -> Panel:
    """A figure. What its lines are of is said once, in the title, if it is the same for all, else in their names."""
    of = {line["of"] for line in lines}
    named = [{**line, "name": f"{line['name']}, {line['of']}" if line["of"] else line["name"]} for line in lines]
    if len(of) == 1:
        named, title = lines, ", ".join(part for part in (title, *of) if part)
    return {"title": title, "unit": unit, "axis": axis, "lines": named, "empty": empty}
