"""The rollouts of a run's logged steps as the viewer reads them, grouped by context."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import Record, is_number, read_parquet
from .runs import Run

if TYPE_CHECKING:
    import pyarrow as pa

PLACES = ("document_id", "block")  # of a context
TEXTS = ("context", "reference", "completion")
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

    Of a file that is damaged, gone since its folder was listed, or without what every context has, there are none.

    Args:
        path: Of `rollouts/step_*.parquet`.
        most: Rollouts to read, evenly spread; at least one context is.
    """
    table = read_parquet(path)
    if table is None or not _has_contexts(table):
        return 0, []
    places: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(*(table[name].to_pylist() for name in PLACES), strict=True)):
        places.setdefault(key, []).append(row)
    largest = max(map(len, places.values()), default=1)
    kept = spread(list(places.values()), max(1, most // largest))
    return len(places), [_context(table.take(rows).to_pylist()) for rows in kept]


def _has_contexts(table: "pa.Table") -> bool:
    """Whether every row says where it is from and what was read and written there."""
    from pyarrow.types import is_integer, is_large_string, is_string

    def is_text(kind: "pa.DataType") -> bool:
        return is_string(kind) or is_large_string(kind)

    for names, fits in ((PLACES, is_integer), (TEXTS, is_text)):
        for name in names:
            if table.column_names.count(name) != 1 or table[name].null_count or not fits(table[name].type):
                return False
    return True


def _context(rows: list[Record]) -> Record:
    """One context and its rollouts.

    Files of RLVR lack what features say and log-probs, files of earlier versions the texts of tokens too: then the
    completion is one text without color. The reward is shown where it is not the sum of two parts. Of the rest, what
    is no number or no text is left out.
    """
    rollouts = []
    for row in rows:
        tokens, log_probs = _tokens(row)
        numbers = {name: _short(row[name]) for name in NUMBERS if is_number(row.get(name))}
        if "alignment" in numbers:
            numbers.pop("reward", None)
        rollouts.append({"tokens": tokens, "log_probs": log_probs, **numbers})
    first = rows[0]
    loss = first.get("feature_matching_loss")
    return {
        "document": first["document_id"],
        "block": first["block"],
        "context": first["context"],
        "reference": first["reference"],
        "loss": _short(loss) if is_number(loss) else None,
        "rollouts": rollouts,
    }


def _tokens(row: Record) -> tuple[list[str], list[float | None]]:
    """The texts of a rollout's tokens and their log-probs, None for one that is not known."""
    texts, log_probs = row.get("token_texts"), row.get("token_log_probs")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return [row["completion"]], []
    known = log_probs if isinstance(log_probs, list) else []
    return texts, [round(value, 2) if is_number(value) else None for value in known]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
