"""The rollouts of a run's logged steps as the viewer reads them, grouped by context."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .runs import Record, Run

NUMBERS = ("alignment", "diversity", "advantage", "log_prob")
DIGITS = 4  # of a number in the viewer; the file has them all


def steps_of(runs: Sequence[Run], most: int) -> Iterator[tuple[Record, list[Record]]]:
    """Every step of every run with rollouts: what it is, and its contexts.

    Where there are more rollouts than `most` in all, every step keeps as many, in whole groups spread evenly over its
    contexts; where there are more steps than that leaves a group for, the steps themselves are spread evenly.

    Args:
        runs: Those to show.
        most: Rollouts in all.

    Yields:
        `run`, `step`, `contexts` and `kept` (how many there are and are shown), and the contexts shown.
    """
    files = [(run, step, path) for run in runs for step, path in run.rollout_files.items()]
    files = spread(files, most)
    left, left_files = most, len(files)
    for run, step, path in files:
        contexts = read_contexts(path)
        in_each = max((len(context["rollouts"]) for context in contexts), default=1)
        kept = spread(contexts, max(1, left // left_files // in_each))
        left, left_files = left - sum(len(context["rollouts"]) for context in kept), left_files - 1
        if kept:
            yield {"run": run.name, "step": step, "contexts": len(contexts), "kept": len(kept)}, kept


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_contexts(path: Path) -> list[Record]:
    """A file's contexts with their rollouts; none of a file that is damaged or gone since its folder was listed.

    Files of earlier versions lack the texts and log-probs of tokens: then the completion is one text without color.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException):
        return []
    groups: dict[tuple[int, int], Record] = {}
    for row in rows:
        group = groups.setdefault(
            (row["document_id"], row["block"]),
            {
                "document": row["document_id"],
                "block": row["block"],
                "context": row["context"],
                "reference": row["reference"],
                "loss": _short(row["feature_matching_loss"]),
                "rollouts": [],
            },
        )
        numbers = {name: _short(row[name]) for name in NUMBERS}
        tokens, log_probs = row.get("token_texts") or [row["completion"]], row.get("token_log_probs") or []
        group["rollouts"].append({"tokens": tokens, "log_probs": list(_all_short(log_probs)), **numbers})
    return list(groups.values())


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _all_short(values: Iterable[float]) -> Iterator[float]:
    return (round(value, 2) for value in values)
