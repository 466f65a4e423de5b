"""Moves what gradient checkpointing keeps, each layer's input, to the machine's memory until the backward; by TRL."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .forward import OFFLOADER, causal_lm


def offload_activations(model: nn.Module) -> None:
    """From now on, what the decoder of `model` keeps for a backward waits in pinned memory of the CPU.

    It goes and comes on a stream of its own, beside the computation. The LM head keeps what it has: its gradient is
    made in the forward already. Only one forward at a time may wait for its backward.
    """
    from trl.models.activation_offloading import OffloadActivations

    offloader, decoder = OffloadActivations(), causal_lm(model).base_model
    offloader.update_model_params(model)

    def when_kept() -> AbstractContextManager[Any]:
        return offloader if torch.is_grad_enabled() else nullcontext()

    vars(decoder)[OFFLOADER] = when_kept
