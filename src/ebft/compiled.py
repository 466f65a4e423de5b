"""`torch.compile` for norms and MLPs, the parts of a decoder layer that attention is not in.

Not for a layer as a whole, let alone the model: who sees whom, and the cache, are new in every forward, and attention
has kernels of its own. Compiled in place, so that weights keep their names and wrappers see the modules they know.
"""

from collections.abc import Iterable

from torch import nn

from ._compat import allow_compiling
from .features import layer_list
from .forward import packs

KINDS = 64  # of forwards that a part is compiled for: with or without gradient, adapted or not, of either network, ...


def compile_layers(decoders: Iterable[nn.Module], backend: str | None = None, mode: str | None = None) -> None:
    """Have the parts of all layers compiled at their first use, for any size of batch, rows and blocks; in place.

    Args:
        decoders: Models without their LM heads; layers that several of them share are compiled once.
        backend: As in `torch.compile`.
        mode: Likewise.

    Raises:
        ValueError: Rollouts of this model cannot share a row; its layers are of kinds that were not tried.
    """
    layers: dict[nn.Module, None] = {}
    for decoder in decoders:
        if not packs(decoder):
            raise ValueError(f"torch_compile=True was not tried with {type(decoder).__name__}: leave it off.")
        layers |= dict.fromkeys(layer_list(decoder)[1])
    allow_compiling(KINDS)
    for layer in layers:
        for part in parts(layer):
            part.compile(dynamic=True, backend=backend or "inductor", mode=mode)


def parts(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that do without attention, which in transformers knows its layer's number."""
    return [part for part in layer.children() if not any(hasattr(module, "layer_idx") for module in part.modules())]
