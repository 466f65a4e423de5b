"""What a run of TRL's trainers writes into its folder: the files of an EBFT run, under the same names."""

import time
from typing import Any, TypeVar

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..artifacts import RunFolder, settings_of
from ..callbacks import StepLine
from ..config import EBFTConfig
from ..finishing import train_no_further
from ..preemption import Preemption
from ..resuming import check_run
from ..saving import save_whole_checkpoints
from .settings import LEARNING_RATES, read_by_ebft_alone

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def recorded(
    trainer: AnyTrainer, args: EBFTConfig, description: dict[str, Any], method: str, names: dict[str, str]
) -> AnyTrainer:
    """The trainer, with the run's files and one short line per step on the screen.

    Args:
        trainer: TRL's.
        args: The settings of all methods.
        description: Settings outside `args`.
        method: `sft` or `rlvr`.
        names: TRL's names of metrics that have another one with us.
    """
    settings = {"learning_rate": LEARNING_RATES[method], **settings_of(args), **description}
    unread = read_by_ebft_alone(method)
    settings = {name: value for name, value in settings.items() if value is not None and name not in unread}
    folder = RunFolder(str(args.output_dir), writes=trainer.is_world_process_zero())
    trainer.add_callback(RunRecord(folder, settings, names))
    trainer.add_callback(Preemption(trainer))
    save_whole_checkpoints(trainer, lambda: {"settings": settings})
    train_no_further(trainer, lambda checkpoint: check_run(checkpoint, settings, trainer))
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StepLine())
    return trainer


class RunRecord(TrainerCallback):
    """Writes settings, metrics and clock readings of a run.

    Args:
        folder: Where.
        settings: What `resolved_config.yaml` says.
        names: TRL's names of metrics that have another one with us, which is added.
    """

    def __init__(self, folder: RunFolder, settings: dict[str, Any], names: dict[str, str]):
        self.folder, self.settings, self.names = folder, settings, names
        self._began, self._seconds = 0.0, 0.0
        self._tokens = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the folder and write the settings; take back what was written after the checkpoint that is resumed."""
        self.folder.acquire()
        args.eval_on_start &= not state.global_step  # the unbroken run does not evaluate here
        self.folder.start(self.settings, state.global_step or None)

    def on_train_end(self, args, state, control, **kwargs):
        """Give the folder back."""
        self.folder.release()

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, before anything is logged, evaluated or saved."""
        self._seconds = time.perf_counter() - self._began

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a record."""
        record = {name: value for name, value in (logs or {}).items() if value is not None}
        record |= {ours: record[theirs] for theirs, ours in self.names.items() if theirs in record}
        if "learning_rate" in record:
            record["step_time"] = self._seconds
            tokens = record.get("num_tokens", 0.0)
            if self._seconds and self._tokens:
                record["tokens_per_second"] = (tokens - self._tokens) / self._seconds
            self._tokens = tokens
        self.folder.log({"epoch": state.epoch, **record}, state.global_step)
