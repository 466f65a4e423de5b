"""What hangs on fixed moments of transformers' training loop."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy


class StepEnd(TrainerCallback):
    """Runs `finish` after each optimiser step, before it is logged and saved."""

    def __init__(self, finish: Callable[[], None]):
        self.finish = finish

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer when a step's number has been counted."""
        self.finish()


# What the terminal shows of a step or an evaluation, and under which name; all else is in metrics.jsonl.
SHOWN = {
    "loss": "loss",
    "ce_loss": "CE",
    "feature_matching_loss": "feature loss",
    "reward": "reward",
    "entropy": "entropy",
    "grad_norm": "grad norm",
    "step_time": "s",
}


class StepLine(ProgressCallback):
    """transformers' progress bar, with one short line per logged step in place of a dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the line above the bar."""
        logs = logs or {}
        kind = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        shown = [f"{name} {logs[kind + key]:.4g}" for key, name in SHOWN.items() if kind + key in logs]
        if self.training_bar is not None and shown:
            self.training_bar.write(f"{'evaluation at ' if kind else ''}step {state.global_step}: " + ", ".join(shown))


class TrainingClock(TrainerCallback, ExportableState):
    """Ends a training, or saves, after so many seconds of optimiser steps; what happens between them does not count.

    Of several processes, all go by the clock of the first: they have to end, and to save, behind the same step.

    Args:
        seconds: The budget; None for no end.
        every: Save a checkpoint after each so many seconds, and at the end; None leaves that to others, the end to us
            where `save_strategy` is `steps`.
    """

    def __init__(self, seconds: float | None, every: float | None = None):
        self.seconds, self.every, self.spent = seconds, every, 0.0
        self._began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run has spent what its checkpoint says."""
        self.spent = _resumed(self, state).get("spent", 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, and the training where the budget is spent."""
        before = self.spent
        self.spent += _of_first_process(time.perf_counter() - self._began)
        ends = self.seconds is not None and self.spent >= self.seconds
        control.should_training_stop |= ends
        if self.every is not None or args.save_strategy == SaveStrategy.STEPS:
            control.should_save |= ends  # as transformers does behind a run's last step
        if self.every is not None:
            control.should_save |= self.spent // self.every > before // self.every

    def why_ended(self, saved: dict[str, Any], args: Any) -> str | None:
        """Why a run with these attributes in its checkpoint is finished; None if it is not."""
        if self.seconds is None or saved.get("spent", 0.0) < self.seconds:
            return None
        return f"its max_train_seconds={self.seconds:g} are spent; raise them to go on."

    def state(self) -> dict[str, Any]:
        """What the Trainer saves."""
        return {"args": {"seconds": self.seconds, "every": self.every}, "attributes": {"spent": self.spent}}


def _of_first_process(value: float) -> float:
    values = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


_LOST_PATIENCE = "early_stopping_patience_counter"


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping; a resumed run goes on with the patience that its checkpoint had left.

    Where `save_strategy` is `steps`, a run that it ends is saved behind its last step, as transformers does otherwise.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run has lost what patience its checkpoint says."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = _resumed(self, state).get(_LOST_PATIENCE, 0)

    def on_evaluate(self, args, state, control, **kwargs):
        """Stop, and save, where no patience is left."""
        super().on_evaluate(args, state, control, **kwargs)
        control.should_save |= control.should_training_stop and args.save_strategy == SaveStrategy.STEPS

    def why_ended(self, saved: dict[str, Any], args: Any) -> str | None:
        """Why a run with these attributes in its checkpoint is finished; None if it is not."""
        lost = saved.get(_LOST_PATIENCE, 0)
        if lost < self.early_stopping_patience:
            return None
        return (
            f"the run stopped early, after {lost} evaluations without a better {args.metric_for_best_model}; raise "
            "early_stopping_patience to go on."
        )


def _resumed(callback: ExportableState, state: Any) -> dict[str, Any]:
    """A callback's attributes in the checkpoint that a run resumes from; none where there is none, or not of it."""
    name = type(callback).__name__
    # transformers writes only into an entry that is there, and fails where a checkpoint was without this callback.
    saved = state.stateful_callbacks.setdefault(name, callback.state())
    return saved["attributes"] if state.global_step else {}


class FeatureNetworkRecord(TrainerCallback, ExportableState):
    """Stores which feature network a run uses inside each checkpoint's `trainer_state.json`."""

    def __init__(self, record: dict[str, Any]):
        self.record = record

    def state(self) -> dict[str, Any]:
        """What the Trainer saves."""
        return {"args": {}, "attributes": {"record": self.record}}


class KernelRecord(FeatureNetworkRecord):
    """Stores likewise which kernel a run uses."""


def why_finished(callbacks: Iterable[Any], args: Any, checkpoint: Path, max_steps: int) -> str | None:
    """Why a run resumed from a checkpoint has nothing left to train, and what would change that; None if it has.

    Args:
        callbacks: Of the run.
        args: Its TrainingArguments.
        checkpoint: A whole one.
        max_steps: Of the whole run.
    """
    saved, step = _saved_state(checkpoint)
    if step >= max_steps:
        return f"the run ended after {step} steps; raise max_steps or num_train_epochs to go on."
    endings = (callback for callback in callbacks if isinstance(callback, (EarlyStopping, TrainingClock)))
    reasons = (ending.why_ended(_attributes(saved, type(ending)), args) for ending in endings)
    return next(filter(None, reasons), None)


def checkpoint_records(checkpoint: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
    """The records of the feature network and the kernel in a checkpoint, None if it has none, and its step.

    Raises:
        ValueError: There is no whole checkpoint at that path.
    """
    saved, step = _saved_state(checkpoint)
    network, kernel = (_attributes(saved, kind).get("record") for kind in (FeatureNetworkRecord, KernelRecord))
    return network, kernel, step


def _saved_state(checkpoint: str | Path) -> tuple[dict[str, Any], int]:
    """What the callbacks saved in a checkpoint, by class, and its step."""
    path = Path(checkpoint) / "trainer_state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"resume_from_checkpoint='{checkpoint}' is not a whole checkpoint: {error}") from error
    return state.get("stateful_callbacks", {}), state["global_step"]


def _attributes(saved: dict[str, Any], kind: type) -> dict[str, Any]:
    found = saved.get(kind.__name__)
    return found["attributes"] if found else {}
