"""What hangs on fixed moments of transformers' training loop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class StepEnd(TrainerCallback):
    """Runs `finish` after each optimiser step, before it is logged and saved."""

    def __init__(self, finish: Callable[[], None]):
        self.finish = finish

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer when a step's number has been counted."""
        self.finish()


class FeatureNetworkRecord(TrainerCallback, ExportableState):
    """Stores which feature network a run uses inside each checkpoint's `trainer_state.json`."""

    def __init__(self, record: dict[str, Any]):
        self.record = record

    def state(self) -> dict[str, Any]:
        """What the Trainer saves."""
        return {"args": {}, "attributes": {"record": self.record}}


def recorded_feature_network(checkpoint: str | Path) -> tuple[dict[str, Any] | None, int]:
    """The record in a checkpoint, None if it has none, and the checkpoint's step.

    Raises:
        ValueError: There is no whole checkpoint at that path.
    """
    path = Path(checkpoint) / "trainer_state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"resume_from_checkpoint='{checkpoint}' is not a whole checkpoint: {error}") from error
    saved = state.get("stateful_callbacks", {}).get(FeatureNetworkRecord.__name__)
    return (saved["attributes"]["record"] if saved else None), state["global_step"]
