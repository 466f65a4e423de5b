"""The tables of a comparison as Markdown, to be pasted into a document: `tables.md`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..evaluation.report import in_digits, label
from .tables import Row

MOST_COLUMNS = 6  # of methods or pairs; more are lines, with a column for each number


def save(path: Path, summary: Sequence[Row], pairs: Sequence[Row], methods: Sequence[str]) -> None:
    """Write what was chosen and its cost, and of each split the means and the paired differences.

    Args:
        path: The file.
        summary: Means over seeds.
        pairs: Differences of two methods.
        methods: In the order of the columns, what all start from first.
    """
    parts = [_table(["method", "setting", "documents", "seconds of training"], _costs(summary, methods))]
    for split in dict.fromkeys(row["split"] for row in summary):
        for title, rows in (("means over seeds", summary), ("paired differences", pairs)):
            found = [row for row in rows if row["split"] == split]
            columns = [name for name in _columns(found, methods) if name in {row["model"] for row in found}]
            if columns:
                parts.append(f"**{split}: {title}**, 95 % t-intervals over seeds\n\n" + _numbers(found, columns))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("\n".join(parts), encoding="utf-8")
    unfinished.replace(path)


def _columns(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    there = list(dict.fromkeys(row["model"] for row in rows))
    return [*(name for name in methods if name in there), *(name for name in there if name not in methods)]


def _costs(summary: Iterable[Row], methods: Sequence[str]) -> list[list[str]]:
    first = {row["model"]: row for row in reversed(list(summary))}
    return [
        [name, first[name]["setting"] or "-", f"{first[name]['documents']:.0f}", f"{first[name]['train_seconds']:.0f}"]
        for name in methods
        if name in first
    ]


def _numbers(rows: Iterable[Row], columns: Sequence[str]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(label(row), {})[row["model"]] = _cell(row, signed=" - " in row["model"])
    if len(columns) > MOST_COLUMNS:
        return _table(["", *cells], [[name, *(line.get(name, "-") for line in cells.values())] for name in columns])
    return _table(["", *columns], [[text, *(line.get(name, "-") for name in columns)] for text, line in cells.items()])


def _cell(row: Row, signed: bool) -> str:
    form = "+.3g" if signed else ".3g"
    text = in_digits(row["mean"], form)
    if row["low"] is not None:
        text += f" [{in_digits(row['low'], form)}, {in_digits(row['high'], form)}]"
    return text + (f", p {row['p_value']:.2g}" if row.get("p_value") is not None else "")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |\n" for row in rows)
