"""What is remembered of one optimiser step until it is over: sums for the metrics, rollouts to save, inputs to report.

Nothing here outlives its step: what is buffered across steps would be lost in a resume.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .sharding import whole


class StepRecorder:
    """Sums [scalars], rollout rows and inputs of the step at hand."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new step begins."""
        self.sums: dict[str, Any] = defaultdict(float)
        self.rollout_rows: list[dict[str, Any]] = []
        self.micro_batches: list[dict[str, Tensor]] = []

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's sums, [B] or scalar each."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value.detach().double().sum()

    def keep_inputs(self, inputs: dict[str, Any], **computed: Tensor | None) -> None:
        """Keep a micro-batch for the report on a step that turns out not to be finite."""
        kept = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        self.micro_batches.append(kept | {k: v.detach() for k, v in computed.items() if v is not None})

    def save_inputs(self, folder: Path, rank: int) -> None:
        """Write the step's micro-batches of this rank as safetensors, keys `<micro-batch>.<name>`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{name}": value.contiguous().cpu().clone()  # safetensors refuses tensors that share memory
            for i, batch in enumerate(self.micro_batches)
            for name, value in batch.items()
        }
        save_file(tensors, folder / f"rank_{rank}.safetensors")

    def norms(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Loss of this rank's micro-batches and norm of the gradients, as scalars on the CPU."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        return torch.as_tensor(self.sums["loss"]).cpu(), whole(norm).cpu()
