"""From records or sums per document to rows of numbers: means with intervals, and paired differences of models."""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from .intervals import DocumentMean

Row = dict[str, Any]  # model, measure, length (None for a single number), mean, low, high, units

EXPONENTIALS = {"cross_entropy/all": "perplexity/all", "cross_entropy/answer": "perplexity/answer"}
LARGEST = math.log(sys.float_info.max)
RATIOS = {"cross_entropy/all": "perplexity_ratio/all", "cross_entropy/answer": "perplexity_ratio/answer"}


def means_of(records: Iterable[Mapping[str, Any]]) -> dict[str, DocumentMean]:
    """Sums and counts of each measure, a row per record in order of their id; zeros where a record lacks it."""
    ordered = sorted(records, key=lambda record: record["id"])
    out = {}
    for name in dict.fromkeys(name for record in ordered for name in record if name != "id"):
        sums = [torch.tensor(record[name][0], dtype=torch.float64) if name in record else None for record in ordered]
        nothing = torch.zeros_like(next(value for value in sums if value is not None))
        counts = [record[name][1] if name in record else 0.0 for record in ordered]
        sums = torch.stack([nothing if value is None else value for value in sums])
        out[name] = DocumentMean(sums, torch.tensor(counts, dtype=torch.float64))
    return out


def summarise(measured: Mapping[str, Mapping[str, DocumentMean]], lengths: Mapping[str, Sequence[Any]]) -> list[Row]:
    """One row per model, or pair of models, and number: mean and 95 % interval over documents.

    Pairs are differences on the same documents with the same noise, in which what the models share cancels. Those of
    other contexts are left out, which one warning says: diversity where a model writes texts too short for a number.

    Args:
        measured: Model -> measure -> sums [M] or [M, L] and counts.
        lengths: Measure -> what the L numbers of it are of; those it does not name are single numbers.
    """
    rows: list[Row] = []
    for name, means in measured.items():
        for measure, value in means.items():
            found = _rows(name, measure, value, lengths)
            rows += found
            if measure in EXPONENTIALS:
                rows += _exponentials(found, EXPONENTIALS[measure])
    left_out: list[str] = []
    for one, other in combinations(measured, 2):
        for measure in dict.fromkeys((*measured[one], *measured[other])):
            pair = measured[one].get(measure), measured[other].get(measure)
            if pair[0] is not None and pair[1] is not None and torch.equal(pair[0].counts, pair[1].counts):
                found = _rows(f"{other} - {one}", measure, pair[1] - pair[0], lengths)
                rows += found
                if measure in RATIOS:
                    rows += _exponentials(found, RATIOS[measure])
            else:
                left_out.append(f"{other} - {one}: {measure}")
    if left_out:
        warnings.warn(
            f"{len(left_out)} paired difference(s) left out, where the two models' numbers are of different contexts "
            f"or only one model has any ({'; '.join(left_out)})",
            stacklevel=2,
        )
    return rows


def _exponentials(rows: Sequence[Row], measure: str) -> list[Row]:
    """The rows' numbers as perplexities, or of a difference as the ratio of two; none of what no float can hold."""
    return [
        row | {"measure": measure} | {key: math.exp(row[key]) for key in ("mean", "low", "high")}
        for row in rows
        if row["high"] < LARGEST
    ]


def _rows(name: str, measure: str, value: DocumentMean, lengths: Mapping[str, Sequence[Any]]) -> list[Row]:
    if not value.counts.any():
        return []
    estimate = torch.stack(value.estimate()).view(3, -1).T.tolist()
    units = int((value.counts > 0).sum())
    return [
        dict(model=name, measure=measure, length=length, mean=mean, low=low, high=high, units=units)
        for length, (mean, low, high) in zip(lengths.get(measure, (None,)), estimate, strict=True)
    ]
