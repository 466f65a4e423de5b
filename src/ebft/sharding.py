"""Weights spread over processes by FSDP2: how they are grouped, and what all processes then have to do alike.

A forward through sharded layers gathers their weights from all processes, so every process has to run the same
forwards in the same order, whatever its documents are. Weights outside the layers are there only within a call of the
root.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .blocks import BlockLayout


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of this model's weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part; then all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(layers: Iterable[nn.Module], root: nn.Module, **options: Any) -> None:
    """Spread a model over all processes: each decoder layer by itself, and all the rest with the root.

    The rest, gathered while a call of the root lasts, holds embeddings and LM head: the head runs as often as there
    are chunks of rows, which is not equally often on all processes.

    Args:
        layers: Of the decoder.
        root: The module that will be called.
        options: Of `fully_shard`.
    """
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(root, **options)


@contextmanager
def gathered(root: nn.Module, keep: bool) -> Iterator[None]:
    """Within it, layers of a sharded model that were gathered for a forward stay so for the next, if `keep`."""
    modules = root.modules() if keep else ()
    layers = [module for module in modules if isinstance(module, FSDPModule) and module is not root]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def precision(bf16: bool) -> MixedPrecisionPolicy:
    """Weights gathered in bfloat16, gradients added up in float32; what a call returns keeps its type."""
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()


def agreed(layouts: Sequence[BlockLayout], sum_over_ranks: Callable[[Tensor], Tensor]) -> list[BlockLayout]:
    """Layouts of some micro-batches, each with a block on every process or on none.

    A process without any gets one that is not valid: its forwards are run, and count for nothing.

    Args:
        layouts: Equally many on each process.
        sum_over_ranks: Adds up a vector [M] over the processes.
    """
    there = torch.tensor([layout.num_blocks > 0 for layout in layouts], dtype=torch.float64)
    anywhere = sum_over_ranks(there).tolist()
    return [
        layout.with_absent_block() if found and not layout.num_blocks else layout
        for layout, found in zip(layouts, anywhere, strict=True)
    ]


def on_any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any of the processes, all of which have to ask."""
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)
