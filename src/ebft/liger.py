"""Liger's kernels in a model's norms, MLPs and rotary embedding; the LM head stays ours, which runs in chunks."""

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
