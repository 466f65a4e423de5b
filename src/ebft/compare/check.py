"""Refuses, before anything is trained, options that `ebft train` or `ebft evaluate` would refuse later."""

import difflib
import re
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ..evaluation.config import EvaluationConfig
from ..evaluation.weights import check_weights
from .cells import TRAIN, Cell
from .config import CompareConfig, Options
from .selection import check_select
from .sources import check_sources

EVALUATES = ("model_name_or_path", "output_dir", "plots")  # what the comparison sets


def check_options(config: CompareConfig, cells: list[Cell]) -> None:
    """Check the options of every method and setting, and of every evaluation.

    Raises:
        ValueError: Names the method or evaluation, and what is wrong.
    """
    for label, options in config.measured().items():
        evaluation_config(options, config.model_name_or_path, Path(config.output_dir) / "base", label)
    check_sources(config)
    check_select(config)
    check_weights(config.model_name_or_path)
    if config.train_seconds is not None:
        for cell in cells:
            _check_schedule(cell)
    with TemporaryDirectory() as folder:
        path = Path(folder) / TRAIN
        for cell in cells:
            if cell.seed == config.seeds[0]:
                path.write_text(yaml.safe_dump(cell.options), encoding="utf-8")
                try:
                    _check_training(path)
                except ValueError as error:
                    text = re.sub(rf"^{re.escape(str(path))}:\d+: ", "", str(error))  # no file of the user's
                    raise ValueError(f"methods.{cell.name} ({cell.setting or 'no grid'}): {text}") from error


def _check_training(path: Path) -> None:
    """What `ebft train --config` would refuse before it loads anything."""
    from ..baselines.rewards import make_reward
    from ..baselines.settings import check_read
    from ..cli.arguments import parse

    arguments = parse(["--config", str(path)])
    method = arguments.method
    if method.method != "ebft":
        check_read(arguments.training, method.method)
    if method.reward is not None:
        make_reward(method.reward, time_limit=method.time_limit, allow_weak_sandbox=method.allow_weak_sandbox)


def _check_schedule(cell: Cell) -> None:
    """Refuse a learning rate that depends on the number of steps, which nobody knows where the clock ends a run.

    Raises:
        ValueError: The schedule or the warm-up is such a one.
    """
    schedule = str(cell.options.get("lr_scheduler_type", "constant"))
    if not schedule.startswith("constant"):
        raise ValueError(
            f"methods.{cell.name}: lr_scheduler_type={schedule!r} needs the number of steps, which train_seconds "
            "leaves open: use constant or constant_with_warmup."
        )
    warmup = float(cell.options["warmup_steps"])
    if 0 < warmup < 1:
        raise ValueError(
            f"methods.{cell.name}: warmup_steps={warmup} is a share of a number of steps that train_seconds leaves "
            "open: give a number of updates."
        )


def evaluation_config(options: Options, model: str, folder: Path, label: str) -> EvaluationConfig:
    """The settings of `ebft evaluate` for one model.

    Raises:
        ValueError: An option is unknown or has a wrong value; names the label.
    """
    known = [spec.name for spec in fields(EvaluationConfig) if spec.name not in EVALUATES]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "see `ebft evaluate --help-all`"
            raise ValueError(f"{label}.{name}: no option of ebft evaluate that can be set here; {remedy}")
    try:
        return EvaluationConfig(model_name_or_path=[model], output_dir=str(folder), plots=False, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label}: {error}") from error
