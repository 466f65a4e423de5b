"""A comparison folder as `ebft compare` writes it: a table of results, and a run folder per cell."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import Record, is_number, is_whole, read_json, read_parquet, read_yaml
from .runs import Run, is_run, read_run
from .statistics import Estimate, over_seeds

RESULTS, PAIRED, SETTINGS = "results.parquet", "paired.parquet", "compare.yaml"
COLUMNS = (
    *("method", "setting", "seed", "split", "step", "documents", "train_seconds"),
    *("measure", "length", "mean", "selected"),
)
COLUMNS_OF_PAIRS = ("split", "model", "measure", "length", "mean", "low", "high", "units", "p_value")
VALIDATION = "validation"  # the split that settings are chosen on, measured during training
PLACES = {"step": "step", "documents": "documents", "seconds": "train_seconds"}


@dataclass(frozen=True)
class Comparison:
    """What a comparison has written so far.

    Attributes:
        path: Its folder.
        settings: Of `compare.yaml`.
        rows: Of `results.parquet`; none before the first evaluation.
        pairs: Of `paired.parquet`, the differences of two methods; none before the end.
        cells: The run folders with what `cell.json` says of them.
    """

    path: Path
    settings: Record
    rows: list[Record]
    pairs: list[Record]
    cells: list[tuple[Run, Record]]

    def selected(self, split: str) -> list[Record]:
        """The rows of a split, of the setting that each method was given on validation data."""
        return [row for row in self.rows if row["selected"] and row["split"] == split and is_number(row["mean"])]

    def selected_cells(self) -> list[Run]:
        """The runs whose numbers are shown: those of the selected settings, and all of methods not measured yet."""
        chosen = {(row["method"], row["setting"]) for row in self.rows if row["selected"]}
        known = {method for method, _ in chosen}
        return [run for run, cell in self.cells if run.method not in known or (run.method, cell["setting"]) in chosen]

    def curve_split(self) -> str:
        """The split that is measured during training: the validation data, where there are any."""
        splits = {row["split"] for row in self.rows}
        return VALIDATION if VALIDATION in splits else self.final_splits()[0]

    def final_splits(self) -> list[str]:
        """The splits of the final numbers, the test data first; the validation data before there are any."""
        splits = dict.fromkeys(row["split"] for row in self.rows if row["split"] != VALIDATION)
        return sorted(splits, key=lambda split: split != "test") or [VALIDATION]


def is_comparison(folder: Path) -> bool:
    """Whether a folder is one that `ebft compare` writes."""
    return any((folder / name).exists() for name in (SETTINGS, RESULTS, "cells"))


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison folder; what is missing, half-written or cannot be used is left out.

    Raises:
        ValueError: The table of results is another one.
    """
    rows, cells = _read_rows(folder / RESULTS), _read_cells(folder / "cells")
    chosen = {row["method"] for row in rows if row["selected"]}
    settings = {(about["method"], about["setting"]) for about in [*rows, *cells.values()]}
    several = Counter(method for method, _ in settings if method not in chosen)

    def name(about: Record) -> str | None:
        """Before one of its settings is chosen, each of them stands for itself, those not measured yet included."""
        method = about["method"]
        return f"{method} ({about['setting']})" if method and several[method] > 1 else method

    rows = [row | {"method": name(row), "selected": row["selected"] or row["method"] not in chosen} for row in rows]
    runs = [(read_run(path, path.name, name(cell), cell.get("seed")), cell) for path, cell in cells.items()]
    return Comparison(folder, read_yaml(folder / SETTINGS), rows, _read_pairs(folder / PAIRED), runs)


def _read_cells(folder: Path) -> dict[Path, Record]:
    """Folder -> what its `cell.json` says; `method` is None if it does not say that yet."""
    found = {}
    for path in sorted(folder.glob("*")):
        cell = read_json(path / "cell.json")
        if cell or is_run(path):
            method, setting = (value if isinstance(value := cell.get(n), str) else None for n in ("method", "setting"))
            found[path] = cell | {"method": method, "setting": setting or ""}
    return found


def _read_rows(path: Path) -> list[Record]:
    table = read_parquet(path)
    if table is None or not table.num_rows:  # no columns either, where nothing was measured
        return []
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: the columns {missing} are missing: name the folder of a comparison")
    return [row | {"setting": row["setting"] or ""} for row in table.to_pylist() if _is_result(row)]


def _read_pairs(path: Path) -> list[Record]:
    table = read_parquet(path)
    if table is None or not set(COLUMNS_OF_PAIRS) <= set(table.column_names):
        return []
    return [row for row in table.to_pylist() if isinstance(row["model"], str) and _is_measured(row)]


def _is_measured(row: Record) -> bool:
    """Whether a row says what its number is of; the number may still be missing."""
    length = row["length"]
    return isinstance(row["split"], str) and isinstance(row["measure"], str) and (length is None or is_number(length))


def _is_result(row: Record) -> bool:
    named = isinstance(row["method"], str) and isinstance(row["setting"], str | None)
    return named and is_whole(row["seed"]) and is_whole(row["step"]) and _is_measured(row)


def methods_of(rows: Iterable[Record]) -> list[str]:
    """The methods in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows))


def measures_of(rows: Iterable[Record]) -> list[tuple[str, int | None]]:
    """The measures with their lengths, in the order of the rows."""
    return list(dict.fromkeys((row["measure"], row["length"]) for row in rows))


def at_each_part(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """One method's one measure over training: at each checkpoint its place on every x axis and the mean over seeds.

    Checkpoints are numbered: with equal time each seed has its own steps. Older tables have steps alone.
    """
    column = "part" if all(is_whole(row.get("part")) for row in rows) else "step"
    parts: dict[int, list[Record]] = {}
    for row in rows:
        parts.setdefault(row[column], []).append(row)
    points = []
    for _, group in sorted(parts.items()):
        place = {}
        for axis, name in PLACES.items():
            known = [row[name] for row in group if is_number(row[name])]
            place[axis] = sum(known) / len(known) if known else 0.0
        points.append(place | {"estimate": over_seeds([row["mean"] for row in group])})
    return points


def at_the_end(rows: Iterable[Record]) -> Estimate:
    """One method's one measure at the last step of each seed, over seeds."""
    last: dict[Any, Record] = {}
    for row in rows:
        if row["seed"] not in last or row["step"] >= last[row["seed"]]["step"]:
            last[row["seed"]] = row
    return over_seeds([row["mean"] for row in last.values()])
