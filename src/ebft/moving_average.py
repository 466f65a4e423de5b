"""A feature network that follows the policy: the exponential moving average of its weights.

It is part of a checkpoint: what it was at a step cannot be made of the weights at that step.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

FILE = "feature_network.safetensors"


class MovingAverage(TrainerCallback):
    """After each optimiser step: average <- decay * average + (1 - decay) * policy.

    Args:
        network: The decoder to keep, float32, of the policy's own kind; changed in place.
        policy: The policy's decoder; of its parameters those that `network` has as well are followed.
        decay: Near 1 it follows slowly.
    """

    def __init__(self, network: nn.Module, policy: nn.Module, decay: float):
        theirs = dict(policy.named_parameters())
        self.pairs = {name: (parameter, theirs[name]) for name, parameter in network.named_parameters()}
        self.decay = decay

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the policy by a step."""
        for average, parameter in self.pairs.values():
            average.lerp_(parameter.to(average), 1 - self.decay)

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        state = {name: average.detach().contiguous() for name, (average, _) in self.pairs.items()}
        save_file(state, Path(folder) / FILE)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take the average of a checkpoint.

        Raises:
            ValueError: It has none.
        """
        state = saved_network(folder)
        for name, (average, _) in self.pairs.items():
            average.copy_(state[name])


def saved_network(folder: str | Path) -> dict[str, Tensor]:
    """What a checkpoint has of a feature network that changes during training.

    Raises:
        ValueError: Nothing.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise ValueError(f"resume_from_checkpoint='{folder}' has no {FILE}: its run had another feature network.")
    return load_file(path)
