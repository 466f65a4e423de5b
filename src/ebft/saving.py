"""Has a Trainer write checkpoints that are whole or do not count, and delete old ones only behind a whole new one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer

import ebft

from ._compat import around_saving
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
    around_saving(trainer, lambda folder: _sealed(trainer, folder, about))


@contextmanager
def _sealed(trainer: Trainer, folder: Path, about: Callable[[], dict[str, Any]]) -> Iterator[None]:
    args, together = trainer.args, trainer.accelerator.wait_for_everyone
    first = args.process_index == 0
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        with _explained(folder):
            if first:
                begin(folder)
            together()
            yield
            together()
            _seal(trainer, folder, about)
            if first:
                rotate(folder.parent, limit, trainer.state.best_model_checkpoint)
    finally:
        args.save_total_limit = limit
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
