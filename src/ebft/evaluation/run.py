"""`evaluate`: several models on the same documents, problems and segments, with one feature network and one seed."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console

from ..extras import require
from . import report
from .config import EvaluationConfig
from .intervals import DocumentMean
from .suites import CodeSuite, DocumentSuite, Session, Suite, TaskSuite, TranslationSuite
from .summary import Row, summarise


class Evaluation(NamedTuple):
    """What was found.

    Attributes:
        rows: Of model, measure, length, mean, low, high, units.
        means: Model -> measure -> a sum and a count of each document, prompt or problem.
        axes: Of each measure that is a curve, what its numbers belong to.
    """

    rows: list[Row]
    means: dict[str, dict[str, DocumentMean]]
    axes: dict[str, Sequence[int]]


def evaluate(config: EvaluationConfig, console: Console | None = None) -> list[Row]:
    """Measure everything that `config` asks for, and write, show and plot it; see `evaluation_of`.

    Returns:
        Rows of model, measure, length, mean, low, high, units; also in `output_dir/results.json` and `.csv`.
    """
    return evaluation_of(config, console).rows


def evaluation_of(config: EvaluationConfig, console: Console | None = None) -> Evaluation:
    """Measure everything that `config` asks for, and write, show and plot it.

    An interrupted call goes on where it stopped: what is measured of a document, problem, segment or task is kept in
    `output_dir/records` and not measured again.

    Args:
        config: What of which models.
        console: Where tables and progress go; the terminal if None.

    Raises:
        ValueError: A model, dataset, benchmark or setting cannot be used; before anything is generated.
    """
    session = Session(config, console or Console())
    with report.locked(session.folder):
        return _evaluate(session)


def _evaluate(session: Session) -> Evaluation:
    """Measure and report, in a folder that is this call's own."""
    config = session.config
    report.check_folder(session.folder, asdict(config))
    if config.plots:
        require("matplotlib", "plot", "plots (leave them out with --plots false)")
    suites = _suites(session)
    about: dict[str, Any] = {
        "config": asdict(config),
        "models": dict(zip(config.names, config.model_name_or_path, strict=True)),
    }
    for suite in suites:
        about |= suite.prepare()
    turns = list(session.turns())
    for turn in turns:
        for suite in suites:
            suite.open_records(turn)
    measured: dict[str, dict[str, DocumentMean]] = {}
    for turn in turns:
        measured[turn.name] = {name: mean for suite in suites for name, mean in suite.measure(turn).items()}
        turn.release()
    axes = {name: axis for suite in suites for name, axis in suite.axes.items()}
    rows = summarise(measured, axes)
    rows += [row for suite in suites for row in suite.rows()]
    _report(session, rows, about)
    return Evaluation(rows, measured, axes)


def _suites(session: Session) -> list[Suite]:
    """What the models are measured on, loaded and checked."""
    config, suites = session.config, []
    for wanted, suite in (
        (config.dataset_name, DocumentSuite),
        (config.code_benchmark, CodeSuite),
        (config.translation, TranslationSuite),
        (config.tasks, TaskSuite),
    ):
        if wanted:
            suites.append(suite(session))
    return suites


def _report(session: Session, rows: list[Row], about: dict[str, Any]) -> None:
    names, folder, console = session.config.names, session.folder, session.console
    report.save(folder, rows, about)
    report.show(console, rows, names, "Means and 95 % intervals")
    pairs = list(dict.fromkeys(row["model"] for row in rows if row["model"] not in names))
    if pairs:
        report.show(console, rows, pairs, "Paired differences: same documents, same noise")
    plots = report.plot(folder, rows, names) if session.config.plots else []
    written = [folder / report.RESULTS, folder / report.NUMBERS, *plots]
    console.print("Written: " + ", ".join(map(str, written)), highlight=False)
