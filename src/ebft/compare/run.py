"""`compare`: run all cells, choose settings on validation data, report them on test data."""

from dataclasses import asdict
from pathlib import Path

import yaml
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..evaluation.report import show
from . import markdown, tables, testing
from .cells import Cell, cells_of
from .check import check_options
from .config import CompareConfig, Options
from .jobs import Training
from .selection import choose
from .sources import validation_digest
from .workers import Workers

RESULTS, SUMMARY, PAIRED, CHOSEN, TABLES = "results", "summary", "paired", "chosen.yaml", "tables.md"


def compare(config: CompareConfig, console: Console | None = None) -> list[tables.Row]:
    """Train and measure all methods, settings and seeds, and write and show the tables.

    A stopped or failed call goes on where it stopped, cell by cell; failed cells are tried again.

    Args:
        config: What to compare.
        console: Where tables and progress go; the terminal if None.

    Returns:
        Means over seeds on the test data, with 95 % intervals; also in `output_dir/summary.csv`.

    Raises:
        ValueError: A setting cannot be used, before anything is trained; or the folder is another comparison's.
        RuntimeError: Some cells failed; the tables are of the others.
    """
    console, folder = console or Console(), Path(config.output_dir)
    cells = cells_of(config, validation_digest(config))
    check_options(config, cells)
    validation = _write(config, cells, folder)
    done = sum(cell.status()["status"] == "done" for cell in cells)
    console.print(f"{len(cells)} runs, {done} of them done: {_counts(config)}", highlight=False)
    _run_cells(config, cells, validation, console)
    with FileLock(folder / "report.lock"):  # another command's may be at work on it
        summary, unmeasured = _report(config, cells, folder, console)
    failed = [f"{c.folder.name}: {c.status().get('error')}" for c in cells if c.status()["status"] == "failed"]
    _tell("runs", failed, len(cells))
    _tell("measurements on test data", unmeasured)
    return summary


def _tell(what: str, failed: list[str], of: int | None = None) -> None:
    if failed:
        count = f"{len(failed)} of {of} {what}" if of else f"{len(failed)} {what}"
        raise RuntimeError(f"{count} failed ({'; '.join(failed[:3])}); the same command tries them again.")


def _counts(config: CompareConfig) -> str:
    points = {len(config.settings_of(name)) for name in config.methods}
    budget = f"{config.documents} documents" if config.documents else f"{config.train_seconds:g} s of training"
    return f"{len(config.methods)} methods x {points.pop()} settings x {len(config.seeds)} seeds, each with {budget}"


def _write(config: CompareConfig, cells: list[Cell], folder: Path) -> Path:
    """Write what is asked for, and what each cell is; the file with the options of the validation."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        cell.write()
        if cell.status()["status"] == "new":
            cell.set_status("new")
    about = {name: value for name, value in asdict(config).items() if value is not None}
    (folder / "compare.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")
    path = folder / "validation.yaml"
    options = testing.with_features(config, config.validation)
    path.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    return path


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left:"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _run_cells(config: CompareConfig, cells: list[Cell], validation: Path, console: Console) -> None:
    with _progress(console) as progress:
        task = progress.add_task("runs", total=len(cells))

        def changed(cell: Cell | None = None) -> None:
            states = [other.status()["status"] for other in cells]
            if cell is not None and cell.status()["status"] == "failed":
                progress.console.print(f"failed: {cell.folder.name}: {cell.status()['error']}", highlight=False)
            text = f"runs ({states.count('failed')} failed)" if "failed" in states else "runs"
            progress.update(task, completed=states.count("done") + states.count("failed"), description=text)

            if cell is not None and cell.status()["status"] == "done":
                _save_so_far(cells, Path(config.output_dir))

        changed()
        waiting = [cell for cell in cells if cell.status()["status"] != "done"]
        Workers(Training(cell, validation, changed) for cell in waiting).run(config.workers)


def _save_so_far(cells: list[Cell], folder: Path) -> None:
    """What is measured while others still run, for `ebft report`: nothing is selected yet."""
    with FileLock(folder / "results.lock"):  # of several workers, and of several commands
        done = [cell for cell in cells if cell.status()["status"] == "done"]
        tables.save_table([row for cell in done for row in tables.validation_rows(cell)], folder, RESULTS)


def _report(config: CompareConfig, cells: list[Cell], folder: Path, console: Console):
    """Choose, measure on the test data, write and show; the means over seeds, and what could not be measured."""
    done = [cell for cell in cells if cell.status()["status"] == "done"]
    if not done:
        return [], []
    rows = [row for cell in done for row in tables.validation_rows(cell)]
    chosen = choose(config, rows)
    for row in rows:
        row["selected"] = chosen[row["method"]][0] == row["setting"]
    models = testing.to_measure(config, done, chosen, folder)
    with _progress(console) as progress:
        task = progress.add_task("measured", total=len(models), completed=sum(model.is_measured() for model in models))
        testing.measure(models, config.workers, lambda: progress.advance(task))
    found, pairs, unmeasured = testing.read(models, config.against)
    rows += found
    (folder / CHOSEN).write_text(yaml.safe_dump(_said(config, chosen), sort_keys=False), encoding="utf-8")
    tables.save_table(rows, folder, RESULTS)
    summary = [row for row in tables.over_seeds(rows) if row["split"] != testing.VALIDATION]
    tables.save_table(summary, folder, SUMMARY)
    tables.save_table(pairs, folder, PAIRED)
    markdown.save(folder / TABLES, summary, pairs, [tables.BASE, *config.methods])
    _show(config, summary, pairs, chosen, console)
    console.print(f"Written: {folder}/{RESULTS}.parquet, {SUMMARY}.csv, {PAIRED}.csv, {TABLES}", highlight=False)
    return summary, unmeasured


def _said(config: CompareConfig, chosen: dict[str, tuple[str, int]]) -> Options:
    by = config.select + (f", length {config.select_length}" if config.select_length else "")
    return {
        "chosen_by": f"{by}, on validation data, mean over seeds",
        **{name: {"setting": setting, "part": part} for name, (setting, part) in chosen.items()},
    }


def _show(config: CompareConfig, summary, pairs, chosen, console: Console) -> None:
    names = [tables.BASE, *config.methods]
    for name, (setting, part) in chosen.items():
        console.print(f"{name}: {setting or 'the only setting'}, checkpoint {part}", highlight=False)
    for split in dict.fromkeys(row["split"] for row in summary):
        rows = [row for row in summary if row["split"] == split]
        show(console, rows, names, f"{split}: means over seeds, 95 % t-intervals")
        rows = [row | {"p_value": None} for row in pairs if row["split"] == split]
        differences = [f"{b} - {a}" for a, b in tables.pairs_of(config.methods, config.against)]
        if differences and rows:
            show(console, rows, differences, f"{split}: paired differences, 95 % t-intervals over seeds")
