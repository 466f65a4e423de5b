"""The tables of a report: what the runs are, their last metrics, final results with intervals, and what failed."""

import math
import shlex
from pathlib import Path
from typing import Any

import yaml

from .comparison import SETTINGS, at_the_end, measures_of, methods_of
from .files import Record, is_number
from .sources import Sources

Table = dict[str, Any]

ABOUT = ("run", "method", "seed", "model", "data", "steps", "documents", "state")
MOST_RUNS = 24  # columns of a table
MOST_COLUMNS = 6  # of methods or pairs; of more, the longer side of a table are its lines


def run_table(sources: Sources) -> Table:
    """A line per run: what is trained on what, with which method, and how far it has come."""
    states = {id(run): cell for _, comparison in sources.comparisons for run, cell in comparison.cells}
    rows = []
    for run in sources.runs:
        last, of = max(run.records, default=0), run.settings.get("max_steps")
        steps = f"{last} of {of}" if is_number(of) and of > 0 else str(last)
        cell = states.get(id(run), {})
        documents = run.places()[last]["documents"] if run.records else 0
        settings = [run.settings.get(name) for name in ("model_name_or_path", "dataset_name")]
        state = cell.get("status") or ("done" if run.finished else "running, or stopped")
        rows.append([run.name, run.method, run.seed, *map(_plain, settings), steps, documents, _plain(state)])
    return _table("Runs", list(ABOUT), rows)


def metric_table(sources: Sources) -> Table:
    """The last value of every metric, a column per run."""
    runs = [run for group in sources.groups for run in group.runs][:MOST_RUNS]
    last = {run.name: run.last() for run in runs}
    keys = dict.fromkeys(key for record in last.values() for key in record if key != "step")
    note = "Values of the last step logged. Those that start with eval_ are of the last evaluation on held-out data."
    rows = [[key, *(_plain(last[run.name].get(key)) for run in runs)] for key in keys]
    return _table("Last metrics", ["metric", *(run.name for run in runs)], rows, note)


def result_tables(sources: Sources) -> list[Table]:
    """Of every comparison, for each split of test data: the final numbers, and the differences of methods."""
    tables = []
    for prefix, comparison in sources.comparisons:
        # Differences of other splits are those of an earlier call, whose numbers are no longer there.
        for split in comparison.final_splits():
            tables.append(_mean_table(f"{prefix}Results on {split} data", comparison.selected(split)))
            pairs = [row for row in comparison.pairs if row["split"] == split and is_number(row["mean"])]
            tables.append(_pair_table(f"{prefix}Paired differences on {split} data", pairs))
    return [table for table in tables if table["rows"]]


def _mean_table(title: str, rows: list[Record]) -> Table:
    """The numbers of each method's selected setting: mean over seeds, 95 % t-interval."""
    methods = methods_of(rows)
    cells = {}
    for measure in measures_of(rows):
        mine = [row for row in rows if (row["measure"], row["length"]) == measure]
        cells |= {(_label(*measure), method): _estimate(mine, method) for method in methods}
    note = "Mean over seeds and 95 % t-interval over seeds. Settings: " + "; ".join(
        f"{method} {', '.join(_settings(rows, method))}" for method in methods
    )
    return _crossed(title, "method", cells, note)


def _pair_table(title: str, rows: list[Record]) -> Table:
    """The differences of two methods, as `ebft compare` has found them."""
    cells = {(_label(row["measure"], row["length"]), row["model"]): _difference(row) for row in rows}
    note = (
        "Mean difference and 95 % t-interval over seeds, paired by seed; p of a sign-flip test over documents or "
        "problems: of these models as they are, not of another training."
    )
    return _crossed(title, "difference", cells, note)


def _crossed(title: str, kind: str, cells: dict[tuple[str, str], Any], note: str) -> Table:
    """Measures by methods, or pairs of them: these have a column each, or a line where they are too many for that."""
    measures, names = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    if len(names) > max(MOST_COLUMNS, len(measures)):
        lines = [[name, *(cells.get((measure, name)) for measure in measures)] for name in names]
        return _table(title, [kind, *measures], lines, note)
    lines = [[measure, *(cells.get((measure, name)) for name in names)] for measure in measures]
    return _table(title, ["measure", *names], lines, note)


def failure_tables(sources: Sources) -> list[Table]:
    """Of every comparison, the cells that failed, with their errors."""
    tables = []
    for prefix, comparison in sources.comparisons:
        failed = [(run, cell) for run, cell in comparison.cells if cell.get("status") == "failed"]
        rows = [
            [*(_plain(cell.get(name)) for name in ("method", "setting", "seed")), run.name, _plain(cell.get("error"))]
            for run, cell in failed
        ]
        if rows:
            columns = ["method", "setting", "seed", "cell", "error"]
            tables.append(_table(f"{prefix}Failed cells", columns, rows))
    return tables


def setting_tables(sources: Sources) -> list[Table]:
    """All settings, those that differ between the runs first; and what each comparison was asked for."""
    runs = sources.runs[:MOST_RUNS]
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [[key, *(_plain(run.settings.get(key)) for run in runs)] for key in keys]
    differ = [row for row in rows if any(value != row[1] for value in row[1:])]
    note = f"The first {len(differ)} differ between the runs." if differ else ""
    rows = differ + [row for row in rows if row not in differ]
    tables = [_table("Settings", ["setting", *(run.name for run in runs)], rows, note)]
    for prefix, comparison in sources.comparisons:
        asked = [[key, _plain(value)] for key, value in comparison.settings.items()]
        tables.append(_table(f"{prefix}Settings of the comparison", ["setting", "value"], asked))
    return [table for table in tables if table["rows"]]


def commands(sources: Sources) -> list[str]:
    """How to run each plain run and each comparison again."""
    in_comparison = {id(run) for _, comparison in sources.comparisons for run, _ in comparison.cells}
    runs = [run for run in sources.runs if id(run) not in in_comparison and run.settings]
    found = [_command("train", run.path, "resolved_config.yaml") for run in runs]
    compared = [comparison for _, comparison in sources.comparisons if comparison.settings]
    return found + [_command("compare", comparison.path, SETTINGS) for comparison in compared]


def _command(verb: str, path: Path, config: str) -> str:
    again = shlex.quote(f"{path}-again")
    return f"ebft {verb} --config {shlex.quote(str(path / config))} --output_dir {again}"


def _estimate(rows: list[Record], method: str) -> dict[str, Any] | None:
    mine = [row for row in rows if row["method"] == method]
    if not mine:
        return None
    return {key: _plain(value) for key, value in at_the_end(mine)._asdict().items()}


def _difference(row: Record) -> dict[str, Any]:
    low, high, p = (value if _is_finite(value := row[name]) else None for name in ("low", "high", "p_value"))
    ends = {"low": None, "high": None} if low is None or high is None else {"low": low, "high": high}
    return {"mean": _plain(row["mean"]), **ends, "seeds": _plain(row["units"]), "p": p}


def _label(measure: str, length: int | None) -> str:
    return measure if length is None else f"{measure}, length {length}"


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _settings(rows: list[Record], method: str) -> list[str]:
    return list(dict.fromkeys(row["setting"] or "as it is" for row in rows if row["method"] == method))


def _plain(value: Any) -> str | float | int | None:
    """A value as a table's cell: numbers stay numbers, unless JSON has none like them."""
    if value is None or isinstance(value, str):
        return value
    if is_number(value):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return str(value)


def _table(title: str, columns: list[str], rows: list[list[Any]], note: str = "") -> Table:
    return {"title": title, "columns": columns, "rows": rows, "note": note}
