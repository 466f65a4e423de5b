"""A resumed run that has come to its end: its weights are loaded, to be saved or used, and nothing is trained."""

from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerCallback

from ._compat import no_epochs_where
from .callbacks import why_finished


def train_no_further(trainer: Trainer, check: Callable[[Path], None] | None = None) -> None:
    """From now on, have a Trainer that resumes a finished run load its last checkpoint, or its best, and end.

    What a run lacks that was killed between its last checkpoint and the writing of its model can then be done.
    transformers would train one step more where `max_steps` lies within an epoch or a callback had ended the training.

    Args:
        trainer: Any Trainer.
        check: Called with the checkpoint of a resume before it is loaded, to refuse it.
    """

    def finished(checkpoint: str, max_steps: int) -> bool:
        if check is not None:
            check(Path(checkpoint))
        reason = why_finished(trainer.callback_handler.callbacks, trainer.args, Path(checkpoint), max_steps)
        if reason and trainer.args.process_index == 0:
            print(f"Nothing is left to train behind {checkpoint}: {reason}", flush=True)
        return reason is not None

    no_epochs_where(trainer, finished)
    trainer.add_callback(_BestOfAMovedRun())


class _BestOfAMovedRun(TrainerCallback):
    """transformers looks for the best checkpoint where it was when it was saved, and else keeps the last weights."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Look in the run's folder."""
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)
