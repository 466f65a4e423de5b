"""A run folder as it is at this moment: settings, metrics by step and rollout files, however far the run has come."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import METRICS, SETTINGS, TIMING
from .files import Record, is_number, is_whole, read_lines, read_yaml


@dataclass(frozen=True)
class Run:
    """What a run has written so far.

    Attributes:
        name: Short, unique within a report.
        path: Its folder.
        settings: Of `resolved_config.yaml`; empty before it is there.
        records: Step -> what was measured there, clock readings and evaluation (`eval_`) included.
        finished: Whether the run came to its end.
        method: Short: a cell's own, or that of the settings, or "ebft", or "sft" for a run without rollouts.
        seed: Of the settings, if known.
    """

    name: str
    path: Path
    settings: Record
    records: dict[int, Record]
    finished: bool
    method: str
    seed: int | None = None
    rollout_files: dict[int, Path] = field(default_factory=dict)

    def values(self, key: str) -> dict[int, float]:
        """Step -> a metric's value, where it was logged."""
        found = {step: record.get(key) for step, record in self.records.items()}
        return {step: float(value) for step, value in found.items() if is_number(value)}

    def last(self) -> Record:
        """The last value of every metric."""
        out: Record = {}
        for record in self.records.values():
            out |= {key: value for key, value in record.items() if is_number(value)}
        return out

    def places(self) -> dict[int, dict[str, float]]:
        """Step -> where it stands on each x axis: `step`, `documents` and `seconds`.

        Documents are steps times the documents per step of one process. A step that was not logged counts as long as
        the next one that was.
        """
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        sizes = [self.settings.get(name) for name in names]
        each = math.prod(size for size in sizes if is_whole(size) and size > 0)
        out, seconds, before = {}, 0.0, 0
        for step, record in self.records.items():
            if is_number(record.get("step_time")):
                seconds += float(record["step_time"]) * (step - before)
                before = step
            out[step] = {"step": step, "documents": step * each, "seconds": seconds}
        return out


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `ebft train` writes, even if hardly anything is in it yet."""
    return any((folder / name).exists() for name in (SETTINGS, METRICS, "rollouts"))


def read_run(folder: Path, name: str, method: str | None = None, seed: Any = None) -> Run:
    """Read a run folder; what is missing or half-written is left out.

    Args:
        folder: The run's.
        name: For the report.
        method: What it trained with, if known; else it is read off the settings.
        seed: If known; else that of the settings. What is no integer tells nothing.
    """
    settings = read_yaml(folder / SETTINGS)
    seed = settings.get("seed") if seed is None else seed
    records: dict[int, Record] = {}
    for path in (folder / METRICS, folder / TIMING):
        for record in read_lines(path):
            records.setdefault(record["step"], {}).update(record)
    files = {}
    for path in (folder / "rollouts").glob("step_*.parquet"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            files[int(number)] = path
    return Run(
        name=name,
        path=folder,
        settings=settings,
        records=dict(sorted(records.items())),
        finished=bool(records) and "train_runtime" in records[max(records)],  # or it was extended
        method=method or _method(settings),
        seed=seed if is_whole(seed) else None,
        rollout_files=dict(sorted(files.items())),
    )


def _method(settings: Record) -> str:
    """What a run trains with: EBFT's own settings do not name it, those of the methods it is compared with do."""
    method = settings.get("method")
    if isinstance(method, str):
        return method
    return "sft" if settings.get("rl_coef") == 0 else "ebft"
