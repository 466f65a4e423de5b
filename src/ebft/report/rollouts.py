"""The rollouts of a run's logged steps as the viewer reads them, grouped by context."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .runs import Record, Run

NUMBERS = ("advantage", "alignment", "diversity", "log_prob", "reward")
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
        count, kept = read_contexts(path, left // left_files)
        left, left_files = left - sum(len(context["rollouts"]) for context in kept), left_files - 1
        if kept:
            yield {"run": run.name, "step": step, "contexts": count, "kept": len(kept)}, kept


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_contexts(path: Path, most: int) -> tuple[int, list[Record]]:
    """How many contexts a file has, and some of them with all their rollouts, in the file's order.

    Of a file that is damaged, or gone since its folder was listed, there are none.

    Args:
        path: Of `rollouts/step_*.parquet`.
        most: Rollouts to read, evenly spread; at least one context is.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return 0, []
    places: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(*(table[name].to_pylist() for name in ("document_id", "block")), strict=True)):
        places.setdefault(key, []).append(row)
    largest = max(map(len, places.values()), default=1)
    kept = spread(list(places.values()), max(1, most // largest))
    return len(places), [_context(table.take(rows).to_pylist()) for rows in kept]


def _context(rows: list[Record]) -> Record:
    """One context and its rollouts.

    Files of RLVR lack what features say and log-probs, files of earlier versions the texts of tokens too: then the
    completion is one text without color. The reward is shown where it is not the sum of two parts.
    """
    rollouts = []
    for row in rows:
        tokens, log_probs = row.get("token_texts") or [row["completion"]], row.get("token_log_probs") or []
        numbers = {name: _short(row[name]) for name in NUMBERS if row.get(name) is not None}
        if "alignment" in numbers:
            numbers.pop("reward", None)
        rollouts.append({"tokens": tokens, "log_probs": [round(value, 2) for value in log_probs], **numbers})
    first = rows[0]
    return {
        "document": first["document_id"],
        "block": first["block"],
        "context": first["context"],
        "reference": first["reference"],
        "loss": _short(first["feature_matching_loss"]) if "feature_matching_loss" in first else None,
        "rollouts": rollouts,
    }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
