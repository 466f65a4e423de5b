"""One training run of a comparison, and its measurements: what it is, where it is, how far it got."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints import last_complete_checkpoint, whole_checkpoints
from .config import CompareConfig, Options

TRAIN, STATUS, LOG, LOCK = "train.yaml", "cell.json", "log.txt", "lock"
ENDLESS = 10**9  # steps, where the clock ends the training
WARMUP = 5  # updates, where a share of all steps would be a share of ENDLESS
ROUNDING = 1e-9  # of a budget divided by its parts


@dataclass(frozen=True)
class Cell:
    """A method with one setting and one seed.

    Attributes:
        name: Of the method, as the comparison calls it.
        setting: Its grid point in words.
        seed: Of the run.
        options: All options of `ebft train`.
        folder: Of the run.
        data: Digest of the training documents' file.
        validation: Digest of what it is measured with, base model included.
    """

    name: str
    setting: str
    seed: int
    options: Options
    folder: Path
    data: str | None = None
    validation: str | None = None

    def write(self) -> None:
        """Write the cell's options, which `ebft train --config` reads.

        Raises:
            ValueError: It was begun with other options or other data.
        """
        path, status = self.folder / TRAIN, self.status()
        if status["status"] != "new":
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
            changed = [key for key in {**before, **self.options} if before.get(key) != self.options.get(key)]
            # Another output_dir is another way to the same folder, or the folder was moved.
            changed = sorted(key for key in changed if key != "output_dir")
            texts = [f"{key} {before.get(key)!r} -> {self.options.get(key)!r}" for key in changed]
            texts += ["the training data"] if status.get("data") != self.data else []
            known = status.get("validation") or self.validation  # not of cells begun with earlier versions
            texts += ["the validation, or the base model"] if known != self.validation else []
            if texts:
                raise ValueError(
                    f"output_dir: {self.folder} was begun with other settings ({', '.join(texts)}): choose another "
                    "output_dir, or delete that folder."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(yaml.safe_dump(self.options, sort_keys=False), encoding="utf-8")
        unfinished.replace(path)

    def status(self) -> Options:
        """What is known of it: `status` (new, running, done, failed) and, where it failed, `error`."""
        try:
            return json.loads((self.folder / STATUS).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {"status": "new"}

    def set_status(self, status: str, **more: Any) -> None:
        """Write what is known of it."""
        about = {"method": self.name, "setting": self.setting, "seed": self.seed, "status": status}
        about |= {"data": self.data, "validation": self.validation, **more}
        unfinished = self.folder / f"{STATUS}.unfinished"
        unfinished.write_text(json.dumps(about), encoding="utf-8")
        unfinished.replace(self.folder / STATUS)

    def checkpoints(self) -> list[Path]:
        """What is measured of it: for each part of its budget the first whole checkpoint behind it, in order.

        A run that was told to stop left one more, at the step where it stood: that one is of no part.
        """
        spent = [(self._spent(path), path) for path in whole_checkpoints(self.folder)]
        end, every = self._end(), float(self.options["save_steps" if self._counts_steps() else "save_seconds"])
        parts = range(1, math.ceil(end / every - ROUNDING) + 1)
        behind = [[path for used, path in spent if used >= min(part * every, end)] for part in parts]
        return [paths[0] for paths in behind if paths]

    def is_trained(self) -> bool:
        """Whether the newest checkpoint is the end of the training."""
        last = last_complete_checkpoint(self.folder)
        return last is not None and self._spent(Path(last)) >= self._end()

    def _counts_steps(self) -> bool:
        return self.options.get("max_train_seconds") is None

    def _end(self) -> float:
        """The budget, in steps or in seconds."""
        return float(self.options["max_steps" if self._counts_steps() else "max_train_seconds"])

    def _spent(self, checkpoint: Path) -> float:
        """What a checkpoint has used of the budget."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if self._counts_steps():
            return state["global_step"]
        from ..callbacks import TrainingClock

        clock = state.get("stateful_callbacks", {}).get(TrainingClock.__name__, {})
        return clock.get("attributes", {}).get("spent", 0.0)


def in_words(setting: Options) -> str:
    """A grid point as text: `learning_rate=1e-4,ce_coef=0.1`."""
    return ",".join(f"{name}={value}" for name, value in setting.items())


def cells_of(config: CompareConfig, validation: str | None = None) -> list[Cell]:
    """All cells, seed by seed: a comparison that is stopped early has all methods at least."""
    data = file_digest(config.dataset_name)
    return [
        replace(_cell(config, name, setting, seed), data=data, validation=validation)
        for seed in config.seeds
        for name in config.methods
        for setting in config.settings_of(name)
    ]


def _cell(config: CompareConfig, name: str, setting: Options, seed: int) -> Cell:
    point = in_words(setting)
    words = "-".join(filter(None, (name, point.replace("/", "_"), f"seed{seed}")))
    folder = Path(config.output_dir) / "cells" / words
    own = {key: value for key, value in config.methods[name].items() if key not in ("grid", "method")}
    options = {"method": config.method_of(name), "model_name_or_path": config.model_name_or_path}
    options |= {"dataset_name": config.dataset_name, **config.train, **own, **setting}
    options |= {"seed": seed, "output_dir": str(folder), "logging_steps": 1}
    options |= _budget(config, documents_of_update(options))
    if config.train_seconds is not None:
        options.setdefault("warmup_steps", WARMUP)
    options["report_to"] = options.get("report_to", "none")
    return Cell(name, point, seed, options, folder)


def documents_of_update(options: Options) -> int:
    """Documents of one update; EBFTConfig's defaults where the options do not say."""
    sizes = (options.get(name, 4) for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return math.prod(int(size) for size in sizes)


def _budget(config: CompareConfig, batch: int) -> Options:
    """What ends a run, and when it is measured; in documents, whatever the method's batch."""
    if config.documents is not None:
        steps = math.ceil(config.documents / batch)
        return {"max_steps": steps, "save_steps": max(1, math.ceil(steps / config.checkpoints))}
    seconds = float(config.train_seconds or 0)
    return {
        "max_steps": ENDLESS,
        "save_steps": ENDLESS,
        "max_train_seconds": seconds,
        "save_seconds": seconds / config.checkpoints,
    }


def seconds_by_step(folder: Path) -> dict[int, float]:
    """Seconds of all optimiser steps up to each, as the run measured them."""
    total, found = 0.0, {0: 0.0}
    for record in _lines(folder / "timing.jsonl"):
        if "step_time" in record:
            total += record["step_time"]
            found[record["step"]] = total
    return found


def _lines(path: Path) -> Iterator[Options]:
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}"))


def file_digest(name: str) -> str | None:
    """What tells one state of a local file from another; None for a folder or a dataset of the Hub."""
    path = Path(name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
