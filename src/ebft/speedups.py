"""What makes a run's layers faster or smaller, as its settings say: Liger's kernels, `torch.compile`, offloading."""

from typing import Any

from torch import nn

from .compiled import compile_layers
from .config import EBFTConfig
from .forward import causal_lm
from .liger import take_liger_kernels_like
from .offloading import keep_activations, offload_activations


def speed_up(args: EBFTConfig, policy: nn.Module, network: Any, reference: nn.Module | None) -> None:
    """Change the layers of a run's networks in place, before anything wraps them.

    Args:
        args: Settings of the run.
        policy: The model to train. Liger's kernels are left to transformers there.
        network: The feature network, or what stands in for one, or None.
        reference: The initial policy, or None.

    Raises:
        ValueError: A model's layers cannot be compiled, or its activations not be moved.
    """
    if args.use_liger_kernel:
        take_liger_kernels_like(policy, (network and network.model, reference), args.liger_kernel_config)
    if args.torch_compile:
        decoders = [causal_lm(model).base_model for model in (policy, reference) if model is not None]
        decoders += [] if network is None else [network.decoder]
        compile_layers(decoders, args.torch_compile_backend, args.torch_compile_mode)
    (offload_activations if args.activation_offloading else keep_activations)(policy)
