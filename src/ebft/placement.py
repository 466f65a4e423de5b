"""Puts frozen networks where the policy is: whole on this process's device, or each process's share of them."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import nn

from .features import FeatureNetwork, layer_list
from .forward import causal_lm
from .sharding import precision, shard


def place_like_policy(model: nn.Module, accelerator: Accelerator, sharded: bool) -> nn.Module:
    """A frozen model in the policy's precision, so that the divergence of the policy from itself is 0."""
    if not sharded:
        return accelerator.prepare_model(model, evaluation_mode=True)
    _shard(layer_list(causal_lm(model).base_model)[1], model, accelerator)
    return model


def place_feature_network(network: Any, accelerator: Accelerator, sharded: bool) -> None:
    """A feature network that is not the policy's base; one that stands in for a `FeatureNetwork` stays whole."""
    if sharded and isinstance(network, FeatureNetwork):
        _shard(layer_list(network.decoder)[1], network.decoder, accelerator)
    else:
        network.model.to(accelerator.device)


def _shard(layers: Iterable[nn.Module], root: nn.Module, accelerator: Accelerator) -> None:
    plugin: Any = accelerator.state.fsdp_plugin
    options = {"mp_policy": precision(accelerator.mixed_precision == "bf16"), "offload_policy": plugin.cpu_offload}
    shard(layers, root, reshard_after_forward=True, **options)  # also the root: no backward will do it
