"""From the measurements of all cells to tables with intervals over seeds.

A row of the tidy table is one number: method, setting, seed, split, part (1 .. checkpoints), step, documents,
train_seconds, measure, length, mean, low, high (over documents or problems), units, selected (its setting was chosen).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from scipy import stats

from ..checkpoints import step_of
from ..evaluation.intervals import DocumentMean
from .cells import Cell, documents_of_update, seconds_by_step

Row = dict[str, Any]
Means = Mapping[str, DocumentMean]  # measure -> sums and counts of units
NUMBERS = ("measure", "length", "mean", "low", "high", "units")
BASE = "base"  # the name of what all methods start from
OF_BASE = {"method": BASE, "setting": "", "seed": 0, "part": 0, "step": 0, "documents": 0, "train_seconds": 0.0}
OF_BASE |= {"selected": True}
FLIPS = 9_999  # of signs, in a paired test
# Without differences of methods: the floor is the references' own, and what is shared differs as the excess does.
NOT_COMPARED = ("feature_matching_floor", "feature_matching_shared")


def validation_rows(cell: Cell) -> list[Row]:
    """The tidy rows of a cell's checkpoints on the validation data."""
    path = cell.folder / "validation" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    seconds, rows = seconds_by_step(cell.folder), []
    for part, checkpoint in enumerate(cell.checkpoints(), 1):
        about = describe(cell, part, step_of(checkpoint), seconds) | {"split": "validation"}
        rows += [about | numbers(row) for row in results["results"] if row["model"] == checkpoint.name]
    return rows


def describe(cell: Cell, part: int, step: int, seconds: Mapping[int, float]) -> Row:
    """What is the same for all numbers of a checkpoint."""
    documents = step * documents_of_update(cell.options)
    about = {"method": cell.name, "setting": cell.setting, "seed": cell.seed, "part": part, "step": step}
    return about | {"documents": documents, "train_seconds": seconds.get(step), "selected": False}


def numbers(row: Row) -> Row:
    """What a row of an evaluation says, without the model."""
    return {name: row.get(name) for name in NUMBERS}


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """Mean and 95 % t-interval over seeds of each method's chosen setting; `units` is the number of seeds."""
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["selected"] and row["mean"] is not None:
            found[row["split"], row["method"], row["measure"], row["length"]].append(row)
    out = []
    for (split, method, measure, length), members in found.items():
        about = {"split": split, "model": method, "setting": members[0]["setting"], "measure": measure}
        about |= {name: float(np.mean([row[name] for row in members])) for name in ("documents", "train_seconds")}
        out.append(about | {"length": length, **t_interval([row["mean"] for row in members])})
    return out


def t_interval(values: Sequence[float]) -> Row:
    """Mean and 95 % interval of a normal mean with unknown variance; no interval of a single value."""
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        low, high = float(mean - half), float(mean + half)
    return {"mean": mean, "low": low, "high": high, "units": len(values)}


def pairs_of(methods: Iterable[str], against: str | None) -> list[tuple[str, str]]:
    """The pairs of methods whose differences are given, the second minus the first."""
    names = list(dict.fromkeys(methods))
    if against is None:
        return list(combinations(names, 2))
    start = [(BASE, against)] if BASE in names and against in names else []
    return start + [(against, name) for name in names if against in names and name not in (BASE, against)]


def paired(
    means: Mapping[tuple[str, int], Means], axes: Mapping[str, Sequence[Any]], split: str, against: str | None = None
) -> list[Row]:
    """Differences of pairs of methods on the same test documents or problems.

    Args:
        means: (method, seed) -> measure -> sums and counts of units; the base model has seed 0 alone.
        axes: Measure -> lengths, of those that are curves.
        split: Of the data.
        against: The method that all others are compared with; every pair if None.

    Returns:
        Rows with the mean difference; its t-interval over seeds, paired by seed; and the p-value of a sign-flip test
        over units, each one's difference averaged over seeds: of models as they are, not of another training.
    """
    rows = []
    for one, other in pairs_of((method for method, _ in means), against):
        pairs = [(means[m, s], means.get((one, 0 if one == BASE else s))) for m, s in means if m == other]
        pairs = [(new, old) for new, old in pairs if old is not None]
        for measure in pairs[0][0] if pairs else ():
            differences = [unit_differences(new, old, measure) for new, old in pairs]
            if measure.startswith(NOT_COMPARED) or any(found is None for found in differences):
                continue
            stacked = np.stack([found for found in differences if found is not None])  # seeds, units, lengths
            for index, length in enumerate(axes.get(measure, (None,))):
                about = {"split": split, "model": f"{other} - {one}", "measure": measure, "length": length}
                about |= t_interval(stacked[:, :, index].mean(1).tolist())
                rows.append(about | {"p_value": sign_flip(stacked[:, :, index].mean(0))})
    return rows


def paired_over_seeds(rows: Iterable[Row], known: Iterable[Row], against: str | None = None) -> list[Row]:
    """Differences of the measures that are of a corpus as a whole, such as BLEU: a t-interval over seeds, no test.

    Args:
        rows: Tidy rows of the chosen cells and the base model on one split.
        known: Rows of `paired`, whose measures are left out.
        against: As in `paired`.
    """
    there = {(row["measure"], row["length"]) for row in known}
    found: dict[tuple, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["measure"].startswith(NOT_COMPARED) or row["mean"] is None:
            continue
        if (row["measure"], row["length"]) not in there:
            found[row["split"], row["measure"], row["length"]][row["method"]][row["seed"]] = row["mean"]
    out = []
    for (split, measure, length), methods in found.items():
        for one, other in pairs_of(methods, against):
            old, new = methods[one], methods[other]
            old = dict.fromkeys(new, old[0]) if one == BASE else old
            differences = [new[seed] - old[seed] for seed in new if seed in old]
            if differences:
                about = {"split": split, "model": f"{other} - {one}", "measure": measure, "length": length}
                out.append(about | t_interval(differences) | {"p_value": None})
    return out


def unit_differences(new: Means, old: Means, measure: str) -> np.ndarray | None:
    """Differences [units, lengths] of what each unit adds to the mean; None where units or counts are not the same."""
    if measure not in old or not np.array_equal(new[measure].counts, old[measure].counts):
        return None
    counts = new[measure].counts.numpy()
    there = counts > 0
    if not there.any():
        return None
    sums = (new[measure].sums - old[measure].sums).reshape(len(counts), -1).numpy()
    return sums[there] / counts[there].mean()


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value that the mean of paired differences is 0, by flipping their signs at random."""
    if not differences.any():
        return 1.0
    found = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        n_resamples=FLIPS,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def save_table(rows: Sequence[Row], folder: Path, name: str) -> None:
    """Write rows as NAME.parquet and NAME.csv, each whole or not at all."""
    table = pa.Table.from_pylist(list(rows))
    for suffix, write in ((".parquet", pyarrow.parquet.write_table), (".csv", pyarrow.csv.write_csv)):
        unfinished = folder / f"{name}{suffix}.unfinished"
        write(table, unfinished)
        unfinished.replace(folder / f"{name}{suffix}")
