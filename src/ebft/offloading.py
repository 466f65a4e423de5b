"""Moves what gradient checkpointing keeps, each layer's input, to the machine's memory until the backward; by TRL."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .forward import OFFLOADER, causal_lm, packs


def offload_activations(model: nn.Module) -> None:
    """From now on, what the decoder of `model` keeps for a backward waits in pinned memory of the CPU.

    It goes and comes on a stream of its own, beside the computation. The LM head keeps what it has: its gradient is
    made in the forward already. Only one forward at a time may wait for its backward.

    Raises:
        ValueError: Rollouts of this model cannot share a row.
    """
    from trl.models.activation_offloading import OffloadActivations

    decoder = causal_lm(model).base_model
    if not packs(decoder):
        raise ValueError(f"activation_offloading=True was not tried with {type(decoder).__name__}: leave it off.")
    offloader = OffloadActivations()
    offloader.update_model_params(model)

    def when_kept() -> AbstractContextManager[Any]:
        return offloader if torch.is_grad_enabled() else nullcontext()

    vars(decoder)[OFFLOADER] = when_kept


def keep_activations(model: nn.Module) -> None:
    """Undo `offload_activations`, which a run before on this very model may have done."""
    vars(causal_lm(model).base_model).pop(OFFLOADER, None)
