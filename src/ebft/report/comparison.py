"""A comparison folder as `ebft compare` writes it: a table of results, and a run folder per cell."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runs import Record, Run, is_number, is_run, read_json, read_run, read_yaml
from .statistics import Estimate, over_seeds

RESULTS, SETTINGS = "results.parquet", "compare.yaml"
COLUMNS = (
    *("method", "setting", "seed", "split", "step", "documents", "train_seconds"),
    *("measure", "length", "mean", "selected"),
)
PLACES = {"step": "step", "documents": "documents", "seconds": "train_seconds"}


@dataclass(frozen=True)
class Comparison:
    """What a comparison has written so far.

    Attributes:
        path: Its folder.
        settings: Of `compare.yaml`.
        rows: Of `results.parquet`; none before the first evaluation.
        cells: The run folders with what `cell.json` says of them.
    """

    path: Path
    settings: Record
    rows: list[Record]
    cells: list[tuple[Run, Record]]

    def selected(self, split: str) -> list[Record]:
        """The rows of a split, of the setting that each method was given on validation data."""
        return [row for row in self.rows if row["selected"] and row["split"] == split and is_number(row["mean"])]

    def selected_cells(self) -> list[Run]:
        """The runs whose numbers are shown: those of the selected settings, and all of methods not measured yet."""
        chosen = {(row["method"], row["setting"]) for row in self.rows if row["selected"]}
        known = {method for method, _ in chosen}
        return [
            run for run, cell in self.cells if run.method not in known or (run.method, cell.get("setting")) in chosen
        ]

    def curve_split(self) -> str:
        """The split that is measured during training: the validation data, where there are any."""
        splits = {row["split"] for row in self.rows}
        return "validation" if "validation" in splits else "test"

    def final_split(self) -> str:
        """The split of the final numbers."""
        return "test" if any(row["split"] == "test" for row in self.rows) else "validation"


def is_comparison(folder: Path) -> bool:
    """Whether a folder is one that `ebft compare` writes."""
    return any((folder / name).exists() for name in (SETTINGS, RESULTS, "cells"))


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison folder; what is missing or half-written is left out.

    Raises:
        ValueError: The table of results is another one.
    """
    rows = _read_rows(folder / RESULTS)
    chosen = {row["method"] for row in rows if row["selected"]}
    open_settings = {(row["method"], row["setting"]) for row in rows if row["method"] not in chosen}

    def name(method: str, setting: Any) -> str:
        """Before one of its settings is chosen, each of them stands for itself."""
        several = sum(other == method for other, _ in open_settings) > 1
        return f"{method} ({setting})" if several else method

    rows = [
        row
        | {"method": name(row["method"], row["setting"]), "selected": row["selected"] or row["method"] not in chosen}
        for row in rows
    ]
    cells = []
    for path in sorted((folder / "cells").glob("*")):
        cell = read_json(path / "cell.json")
        if cell or is_run(path):
            method = cell.get("method")
            method = name(method, cell.get("setting")) if isinstance(method, str) else None
            cells.append((read_run(path, path.name, method, cell.get("seed")), cell))
    return Comparison(folder, read_yaml(folder / SETTINGS), rows, cells)


def _read_rows(path: Path) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return []
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: the columns {missing} are missing: name the folder of a comparison")
    return table.to_pylist()


def methods_of(rows: Iterable[Record]) -> list[str]:
    """The methods in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows))


def measures_of(rows: Iterable[Record]) -> list[tuple[str, int | None]]:
    """The measures with their lengths, in the order of the rows."""
    return list(dict.fromkeys((row["measure"], row["length"]) for row in rows))


def at_each_step(rows: Iterable[Record]) -> list[dict[str, Any]]:
    """One method's one measure over training: at each step its place on every x axis and the mean over seeds."""
    by_step: dict[int, list[Record]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    points = []
    for _, group in sorted(by_step.items()):
        place = {}
        for axis, column in PLACES.items():
            known = [row[column] for row in group if is_number(row[column])]
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
