"""Has a Trainer write checkpoints that are whole or do not count, and delete old ones only behind a whole new one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

import ebft

from ._compat import around_saving, before_saving
from .artifacts import stopped_at
from .checkpoints import begin, checksums, files_of, rotate, seal, step_of

TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # in the messages of torch.save where it cannot write


def save_whole_checkpoints(trainer: Trainer, about: Callable[[], dict[str, Any]]) -> None:
    """From now on, mark, checksum and seal every checkpoint of a Trainer, and rotate behind that.

    transformers writes in place, deletes old checkpoints while other processes may still be writing, and takes the
    newest folder for the newest checkpoint, half of one included.

    Args:
        trainer: Any Trainer.
        about: Called on the first process: `settings` and `data` for the manifest.
    """
    kept = _Kept()
    trainer.add_callback(kept)
    trainer.add_callback(behind := _BehindTheEpoch(trainer))
    before_saving(trainer, behind.hold)
    around_saving(trainer, lambda folder: _sealed(trainer, folder, about, kept))


class _Kept(TrainerCallback):
    """How many checkpoints to keep, unknown to transformers while a training lasts.

    It would delete old ones by itself, and with `save_total_limit: 1` at the end the newest, where another is best.
    """

    limit: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Take it."""
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(self, args, state, control, **kwargs):
        """Give it back."""
        args.save_total_limit = self.limit


class _BehindTheEpoch(TrainerCallback):
    """Has the checkpoint of an epoch's last step wait for what the epoch's end evaluates and logs, to hold that too.

    transformers saves before it, so that a run killed during the evaluation would go on, or end, without it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.in_epoch = self.waits = False

    def on_step_begin(self, args, state, control, **kwargs):
        """The epoch goes on."""
        self.in_epoch, self.waits = True, False

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save what waits."""
        self.in_epoch = False
        control.should_save |= self.waits

    def hold(self) -> None:
        """Behind a step, before anything is saved."""
        args, state, control = self.trainer.args, self.trainer.state, self.trainer.control
        due = IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy)
        last = control.should_training_stop or state.epoch == int(state.epoch or 0)
        # With `best` an evaluation decides by itself.
        if self.in_epoch and due and last and args.save_strategy != SaveStrategy.BEST:
            self.waits, control.should_save = control.should_save, False


@contextmanager
def _sealed(trainer: Trainer, folder: Path, about: Callable[[], dict[str, Any]], kept: _Kept) -> Iterator[None]:
    first, together = trainer.args.process_index == 0, trainer.accelerator.wait_for_everyone
    with _explained(folder):
        if first:
            begin(folder)
        together()
        yield
        together()
        _seal(trainer, folder, about)
        if first:
            rotate(folder.parent, kept.limit, trainer.state.best_model_checkpoint)
    together()


def _seal(trainer: Trainer, folder: Path, about: Callable[[], dict[str, Any]]) -> None:
    """Each process reads a share of the files; the first writes the manifest."""
    rank, count = trainer.args.process_index, trainer.accelerator.num_processes
    share = list(checksums(folder, files_of(folder)[rank::count]).items())
    files = dict(sorted(gather_object(share))) if count > 1 else dict(share)
    if rank == 0:
        run = {"format": 1, "version": ebft.__version__, "step": step_of(folder), "processes": count}
        seal(folder, files, {**run, "model_only": trainer.args.save_only_model, **about()})


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what cannot be written, and what became of the run.

    Raises:
        OSError: The checkpoint cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        reason = stopped_at(folder.parent)
        raise OSError(f"{folder} could not be written ({' '.join(str(error).split())}): {reason}") from error
