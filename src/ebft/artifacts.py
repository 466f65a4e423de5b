"""What a run writes into its output folder, whatever else is logging: settings, metrics, rollouts, model card.

`metrics.jsonl` and `rollouts/` hold only what is a function of the run's settings, so that an interrupted and resumed
run leaves the same files as an unbroken one; what a clock says goes into `timing.jsonl`.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .checkpoints import SUPERSEDED, last_complete_checkpoint, step_of, tidy, whole_checkpoints
from .locks import lock

if TYPE_CHECKING:  # at run time it would bring transformers along, and `ebft report` reads these files without
    from .config import EBFTConfig

METRICS, TIMING, SETTINGS, LOCK = "metrics.jsonl", "timing.jsonl", "resolved_config.yaml", ".run.lock"
CLOCK = ("step_time", "tokens_per_second")
CLOCK_ENDINGS = ("_runtime", "_per_second", "_preparation_time")


def check_output_dir(output_dir: str | Path, resuming: bool) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        ValueError: The folder holds another run and this one does not resume it, or it is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir='{output_dir}' is a file: name a folder.")
    if resuming or not folder.is_dir():
        return
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None and not (folder / METRICS).exists():
        return  # at most settings: a run that never got going
    found = METRICS if checkpoint is None else Path(checkpoint).name
    remedy = "continue that run with resume_from_checkpoint: true, " if checkpoint else ""
    raise ValueError(
        f"output_dir='{output_dir}' holds another run ({found}): choose another folder, {remedy}or delete it."
    )


def check_resume(output_dir: str | Path, checkpoint: str | Path) -> None:
    """Refuse a resume that would mix two runs in a folder.

    Raises:
        ValueError: The folder holds a run that the checkpoint is not of.
    """
    if Path(checkpoint).resolve().parent != Path(output_dir).resolve():
        check_output_dir(output_dir, resuming=False)


def forget_start(folder: Path) -> None:
    """Remove what a run left that did not come as far as its first checkpoint.

    Raises:
        ValueError: It came to its end, without one.
    """
    found = next(folder.glob("*.safetensors"), None)
    if found is not None:
        raise ValueError(
            f"output_dir='{folder}' holds a model ({found.name}) and no checkpoint, as a run does that was finished "
            "with save_strategy: no: choose another folder, or delete it."
        )
    for name in (METRICS, TIMING):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "rollouts").glob("step_*.parquet"):
        path.unlink(missing_ok=True)


class RunFolder:
    """Writes a run's files; on all ranks but the first it does nothing.

    Args:
        output_dir: The run's folder.
        writes: Whether this process writes.
    """

    def __init__(self, output_dir: str | Path, writes: bool = True):
        self.path = Path(output_dir)
        self.writes = writes
        self.written = False  # whether this process has written a record
        self._lock: Any = None

    def acquire(self) -> None:
        """Keep the folder for this process: two runs would write the same files.

        Raises:
            ValueError: It cannot be made or written to, or another run has it.
        """
        if self.writes and self._lock is None:
            self._lock = lock(self.path, LOCK, "ebft train")

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def start(self, settings: dict[str, Any], resume_step: int | None) -> None:
        """Begin a run, or take back what was written after the checkpoint it resumes from."""
        if not self.writes:
            return
        tidy(self.path)
        step = resume_step or 0
        for path in whole_checkpoints(self.path):  # first: a kill must not leave them with shortened files
            if step_of(path) > step:  # of another branch now: it must not be taken for the newest of this one
                path.rename(path.with_name(f"{SUPERSEDED}{time.time_ns()}-{path.name}"))
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (self.path / SETTINGS).write_text(text, encoding="utf-8")
        for name in (METRICS, TIMING):
            if (self.path / name).exists():
                _keep_lines(self.path / name, step)
        for path in (self.path / "rollouts").glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def log(self, record: dict[str, Any], step: int) -> None:
        """Append one record of metrics, its clock readings apart."""
        if not self.writes:
            return
        summary = "train_loss" in record  # transformers' last record: averages over this process's part of the run
        if summary and _is_summed_up(self.path / TIMING, step):
            return  # of no step: a resume that had nothing left to train
        clock = {k: v for k, v in record.items() if summary or k in CLOCK or k.endswith(CLOCK_ENDINGS)}
        for name, part in ((METRICS, {k: v for k, v in record.items() if k not in clock}), (TIMING, clock)):
            if part:
                self.written = True
                with (
                    written(self.path / name, self.path),
                    open(self.path / name, "a", encoding="utf-8") as file,
                ):
                    file.write(json.dumps({"step": step, **part}) + "\n")

    def save_rollouts(self, rows: list[dict[str, Any]], step: int) -> None:
        """Write one step's rollouts, a row each, in the order of documents, blocks and rollouts."""
        if not self.writes or not rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = sorted(rows, key=lambda row: (row["document_id"], row["block"], row["rollout"]))
        folder = self.path / "rollouts"
        unfinished = folder / "unfinished"  # renamed when whole, so that a killed run leaves no half a file
        with written(unfinished, self.path):
            folder.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), unfinished)
            os.replace(unfinished, folder / f"step_{step:06d}.parquet")


@contextmanager
def written(path: Path, output_dir: Path) -> Iterator[None]:
    """Say of a file that cannot be written, while a run goes on, what became of the run.

    Raises:
        OSError: It cannot; the message names the file, the reason and the checkpoint to go on from.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}): {stopped_at(output_dir)}") from error


def stopped_at(output_dir: Path) -> str:
    """How much room there is, and where a run that could not write goes on."""
    free = shutil.disk_usage(output_dir).free / 2**30
    return f"the run stopped. {free:.2f} GiB are free there: make room, {where_to_go_on(output_dir)}."


def where_to_go_on(output_dir: Path) -> str:
    """What to do when the cause of a stop is mended."""
    last = last_complete_checkpoint(output_dir)
    return f"then go on from {last} with resume_from_checkpoint: last" if last else "then start anew"


def _is_summed_up(path: Path, step: int) -> bool:
    """Whether a training that ended at this step has left its averages."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(record["step"] == step and "train_loss" in record for record in map(json.loads, lines))


def _keep_lines(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that was cut off by a kill."""
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no record of a step ({error}): remove that line.") from error
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)


# transformers' settings that decide the outcome of a run: written even where they are its defaults, which may change.
DECISIVE = (
    *("seed", "data_seed", "num_train_epochs", "max_steps", "optim", "adam_beta1", "adam_epsilon", "max_grad_norm"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "train_sampling_strategy", "dataloader_drop_last"),
)


def settings_of(args: "EBFTConfig") -> dict[str, Any]:
    """The settings that make a run what it is: all of ours, transformers' that decide it or differ from its defaults.

    Tokens and keys are left out. The result can be given to `ebft train --config` again.
    """
    from .config import EBFTConfig

    ours = set(EBFTConfig.__annotations__)
    out = {}
    for spec in dataclasses.fields(EBFTConfig):
        value = getattr(args, spec.name)
        default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
        if spec.name.endswith("_token") or spec.name in ("local_rank", "resume_from_checkpoint") or not spec.init:
            continue
        if spec.name in ours or spec.name in DECISIVE or _plain(value) != _plain(default):
            out[spec.name] = _plain(value)
    return {k: v for k, v in out.items() if v is not None}


def _plain(value: Any) -> Any:
    """A value as YAML can say it."""
    if hasattr(value, "value"):  # an enum of transformers
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else str(value)
