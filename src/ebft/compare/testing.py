"""Measures the base model and what was chosen, on test data: several models at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.console import Console

from ..checkpoints import step_of
from ..evaluation.report import RESULTS
from ..evaluation.run import Evaluation, evaluation_of
from . import tables
from .cells import LOG, Cell, seconds_by_step
from .check import evaluation_config
from .config import CompareConfig, Options
from .jobs import EVALUATE, Measurement
from .workers import Workers

VALIDATION = "validation"


@dataclass(frozen=True)
class Measured:
    """One model on the data of one split.

    Attributes:
        about: What the tidy rows of its numbers have in common: method, seed, split, ...
        model: Its folder or name.
        options: Of `ebft evaluate`.
        folder: Of its numbers.
    """

    about: tables.Row
    model: str
    options: Options
    folder: Path

    def is_measured(self) -> bool:
        """Whether there are results."""
        return (self.folder / RESULTS).exists()

    def write(self) -> None:
        """Write all options to where a process reads them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        every = {"model_name_or_path": [self.model], "output_dir": str(self.folder), "plots": False, **self.options}
        (self.folder / EVALUATE).write_text(yaml.safe_dump(every, sort_keys=False), encoding="utf-8")

    def read(self) -> Evaluation:
        """What was found; measures what is missing, and fails where that cannot be done."""
        settings = evaluation_config(self.options, self.model, self.folder, self.about["split"])
        with open(self.folder / LOG, "a", encoding="utf-8") as log:
            return evaluation_of(settings, Console(file=log, width=120))


def to_measure(
    config: CompareConfig, done: Sequence[Cell], chosen: Mapping[str, tuple[str, int]], folder: Path
) -> list[Measured]:
    """The base model on the validation and the test data, and on the latter each cell of a chosen setting."""
    tests = {"test": config.test, **config.more_tests}
    found = []
    for split, options in {VALIDATION: config.validation, **tests}.items():
        about = tables.OF_BASE | {"split": split}
        options = with_features(config, options)
        found.append(Measured(about, config.model_name_or_path, options, folder / tables.BASE / split))
    for cell in done:
        setting, part = chosen[cell.name]
        if cell.setting != setting or len(cell.checkpoints()) < part:
            continue
        checkpoint = cell.checkpoints()[part - 1]
        about = tables.describe(cell, part, step_of(checkpoint), seconds_by_step(cell.folder)) | {"selected": True}
        for split, options in tests.items():
            options = with_features(config, options)
            # One folder per checkpoint: more cells, or another `checkpoint`, may choose another one.
            where = cell.folder / f"{split}-{checkpoint.name}"
            found.append(Measured(about | {"split": split}, str(checkpoint), options, where))
    return found


def with_features(config: CompareConfig, options: Options) -> Options:
    """Options of an evaluation, with the one feature network of all: what the methods start from."""
    documents = "dataset_name" in options
    if documents and "feature_matching" in options.get("metrics", ["feature_matching"]):
        return {"feature_model_name_or_path": config.model_name_or_path, **options}
    return options


def measure(models: Sequence[Measured], workers: int, on_end: Callable[[], object]) -> None:
    """Measure those without results, in so many processes at a time; `on_end` is told of each."""
    new = [model for model in models if not model.is_measured()]
    for model in new:
        model.write()
    Workers(Measurement(model.folder, on_end) for model in new).run(workers)


class Results(NamedTuple):
    """What was measured.

    Attributes:
        rows: Tidy rows of all models.
        pairs: On the test data the differences of each pair of methods, or to one of them.
        failed: What could not be measured, with the reason.
    """

    rows: list[tables.Row]
    pairs: list[tables.Row]
    failed: list[str]


def read(models: Sequence[Measured], against: str | None) -> Results:
    """The numbers of all models; one that cannot be measured does not lose those of the others."""
    rows, pairs, failed = [], [], []
    for split in dict.fromkeys(model.about["split"] for model in models):
        measured: list[tuple[Measured, Evaluation]] = []
        for model in models:
            if model.about["split"] == split:
                try:
                    measured.append((model, model.read()))
                except (ValueError, OSError, RuntimeError) as error:  # of the memory too: it is told at the end
                    failed.append(f"{model.folder}: {error}")
        found = [model.about | tables.numbers(row) for model, evaluation in measured for row in evaluation.rows]
        rows += found
        if split != VALIDATION and measured:
            keys = [(model.about["method"], model.about["seed"]) for model, _ in measured]
            means = {key: next(iter(each.means.values())) for key, (_, each) in zip(keys, measured, strict=True)}
            of_units = tables.paired(means, measured[0][1].axes, split, against)
            pairs += of_units + tables.paired_over_seeds(found, of_units, against)
    return Results(rows, pairs, failed)
