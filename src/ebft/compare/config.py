"""The settings of a comparison; imports no torch, so that a wrong one is told at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..credentials import check_no_credentials

METHODS = ("ebft", "sft", "rlvr")
# What a comparison sets by itself: the same for all methods, or a cell's own.
OURS = ("model_name_or_path", "dataset_name", "output_dir", "seed")
OURS += ("max_steps", "num_train_epochs", "max_train_seconds", "save_steps", "save_seconds", "save_strategy")
OURS += ("save_total_limit", "logging_steps", "resume_from_checkpoint", "num_processes", "accelerate_config")
OURS += ("early_stopping_patience",)  # runs would end before their budget, and on data that no check knows of
# Which documents and which model: the same for all methods, so given in `train` alone.
FOR_ALL = ("dataset_config", "dataset_train_split", "eval_split_size", "model_revision")
NOT_A_SPLIT = ("base", "validation", "test", "rollouts", "train")  # other folders and splits of a cell
LOWER_IS_BETTER = ("cross_entropy", "perplexity", "feature_matching", "duplicate_rate", "self_bleu")
# The same for metrics of lm-evaluation-harness, which stand behind the name of their task.
LOWER_OF_TASKS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")

Options = dict[str, Any]


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _number_or_text(value: Any) -> float | str:
    """What tells a value from others: YAML takes 1e-4 for text, 1.0e-4 for a number."""
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()


@dataclass
class CompareConfig:
    """What `ebft compare` trains and measures; field descriptions are in the metadata of each.

    Raises:
        ValueError: A setting is missing, out of range, or contradicts another; names it and the remedy.
    """

    model_name_or_path: str = _setting("", "What all methods start from: the base model, or a warm start.")
    dataset_name: str = _setting("", "Training documents of all methods.")
    methods: dict = _setting({}, "Name -> options of `ebft train`, `method` among them, and `grid`: option -> values.")
    train: dict = _setting({}, "Options of `ebft train` for all methods.")
    documents: int | None = _setting(None, "Equal documents: each run trains on so many, epoch after epoch.")
    train_seconds: float | None = _setting(None, "Equal time: each run trains for so many measured seconds.")
    seeds: list[int] = _setting([0, 1, 2], "Of order, adapters and rollouts; every method runs with each.")
    checkpoints: int = _setting(4, "How often, in equal parts, a run is measured on the validation data.")
    validation: dict = _setting({}, "Options of `ebft evaluate`: on these data settings are chosen.")
    test: dict = _setting({}, "Likewise: on these data the chosen settings are reported.")
    more_tests: dict = _setting({}, "Name -> options of `ebft evaluate`: further data to report on.")
    select: str = _setting("cross_entropy/answer", "Measure that chooses among settings, on validation data.")
    select_length: int | None = _setting(None, "Its completion length, where it is measured at several.")
    checkpoint: str = _setting("best", "Report the best checkpoint (on validation data) or the `last` one.")
    against: str | None = _setting(None, "Give differences to this method alone. Default: of every pair of methods.")
    output_dir: str = _setting("", "Where everything goes. Default: runs/compare-DATA.")
    workers: int = _setting(1, "Runs at a time. More `ebft compare` commands in one output_dir share the work.")

    def __post_init__(self) -> None:
        check_no_credentials(vars(self))
        for name in ("model_name_or_path", "dataset_name", "methods", "validation", "test"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; every comparison needs it.")
        if (self.documents is None) == (self.train_seconds is None):
            raise ValueError("documents, train_seconds: give one of them, the budget of every run.")
        for name in ("documents", "train_seconds", "checkpoints", "workers"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be above 0.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds}: give different numbers, each at least 0.")
        if self.checkpoint not in ("best", "last"):
            raise ValueError(f"checkpoint={self.checkpoint!r}: use best or last.")
        if self.against is not None and self.against not in self.methods:
            raise ValueError(f"against={self.against!r}: no method of this comparison ({', '.join(self.methods)}).")
        self._check_options()
        points = {name: len(self.settings_of(name)) for name in self.methods}
        if len(set(points.values())) > 1:
            text = ", ".join(f"{name} {count}" for name, count in points.items())
            raise ValueError(f"methods: their grids have different numbers of settings ({text}): tune all alike.")
        self.output_dir = self.output_dir or str(Path("runs") / f"compare-{Path(self.dataset_name).stem}")
        if Path(self.output_dir).is_file():
            raise ValueError(f"output_dir={self.output_dir!r} is a file: name a folder.")

    def _check_options(self) -> None:
        trained = {"train": self.train, **{f"methods.{name}": options for name, options in self.methods.items()}}
        grids = {f"{label}.grid": options["grid"] for label, options in trained.items() if "grid" in (options or {})}
        for label, options in {**trained, **grids, **self.measured()}.items():
            if not isinstance(options, Mapping):
                raise ValueError(f"{label}: {options!r} where lines `option: value` are expected.")
        for label, options in trained.items():
            names = {*options, *options.get("grid", {})}
            taken = [name for name in OURS + (() if label == "train" else FOR_ALL) if name in names]
            if taken:
                raise ValueError(f"{label}.{taken[0]}: the comparison sets it for all methods alike; remove it.")
        for name in self.more_tests:
            if not _is_plain(name) or name in NOT_A_SPLIT:
                raise ValueError(
                    f"more_tests.{name}: make the name of letters, digits, - and _, and none of "
                    f"{', '.join(NOT_A_SPLIT)}."
                )
        for name in self.methods:
            if not _is_plain(name) or name == "base":
                raise ValueError(f"methods.{name}: make the name of letters, digits, - and _, and not `base`.")
            method = self.method_of(name)
            if method not in METHODS:
                raise ValueError(f"methods.{name}.method={method!r}: use one of {', '.join(METHODS)}.")
            for option, values in self.methods[name].get("grid", {}).items():
                if not isinstance(values, list) or not values or len(set(map(_number_or_text, values))) < len(values):
                    raise ValueError(f"methods.{name}.grid.{option}={values!r}: give a list of different values.")

    def measured(self) -> dict[str, Options]:
        """What is measured, as the settings call it: options of `ebft evaluate`."""
        more = {f"more_tests.{name}": options for name, options in self.more_tests.items()}
        return {"validation": self.validation, "test": self.test, **more}

    def method_of(self, name: str) -> str:
        """What `ebft train` calls the method of that name."""
        return str(self.methods[name].get("method", name))

    def settings_of(self, name: str) -> list[Options]:
        """The grid points of a method: all combinations of its values."""
        grid = self.methods[name].get("grid", {})
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def lower_is_better(self) -> bool:
        """Whether the smallest value of `select` is the best one."""
        return self.select.startswith(LOWER_IS_BETTER) or self.select.rpartition("/")[2].startswith(LOWER_OF_TASKS)
