"""Liger's kernels in a model's norms, MLPs and rotary embedding; the LM head stays ours, which runs in chunks."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .forward import causal_lm

# Liger's own losses would replace the forward that block rollouts need.
LOSSES = ("fused_linear_cross_entropy", "cross_entropy")
WITHOUT_LOSSES = dict.fromkeys(LOSSES, False)


def take_liger_kernels(model: nn.Module, config: dict[str, Any] | None = None) -> None:
    """Patch a model in place, as transformers does for `use_liger_kernel`; the rotary embedding for its whole family.

    Args:
        model: A causal LM, or one under a wrapper.
        config: Which kernels, as `liger_kernel_config`; by default all but the losses.

    Raises:
        ImportError: The package is not there.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(causal_lm(model), {**(config or {}), **WITHOUT_LOSSES})


def take_liger_kernels_like(
    policy: nn.Module, frozen: Iterable[nn.Module | None], config: dict[str, Any] | None
) -> None:
    """Patch the frozen networks that are not the policy itself, which transformers patches alone."""
    for network in {network for network in frozen if network is not None and network is not policy}:
        take_liger_kernels(network, config)
