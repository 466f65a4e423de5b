"""Loads the frozen network whose features a reward function compares."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..features import NORMS, REDUCTIONS, FeatureNetwork, decoder_up_to, layer_indices
from ..forward import causal_lm
from ..pretrained import attention_options, load_config, load_tokenizer, read_weights
from ..support import check_config

POOLINGS = ("last_token", "mean_pooling")  # the others need completions of one length


def load_network(
    model: str | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    layers: Sequence[float | int] = (0.25, 0.5, 0.75),
    pooling: str = "last_token",
    norm: str = "joint",
    reduction: str = "concat",
    dtype: torch.dtype = torch.float32,
) -> FeatureNetwork:
    """A frozen feature network that shares nothing with any other model, cut off above its highest tap.

    Args:
        model: Hub name or path, or a model, which is copied as it is now, in its own dtype.
        tokenizer: The policy's; its ids must mean the same to the network.
        revision: Branch, tag or commit of a name on the Hub.
        layers: As in `FeatureNetwork`.
        pooling: `last_token` or `mean_pooling`.
        norm: As in `FeatureNetwork`.
        reduction: As in `FeatureNetwork`.
        dtype: Of the weights of a model given by name.

    Raises:
        ValueError: A name or the model is unknown, or the model is of a kind that is not supported, has adapters,
            another vocabulary or too few layers.
    """
    for field, value, allowed in (
        ("pooling", pooling, POOLINGS),
        ("feature_norm", norm, NORMS),
        ("feature_reduction", reduction, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{field}={value!r} cannot be used here: use one of {', '.join(allowed)}.")
    if hasattr(model, "peft_config"):
        raise ValueError("feature_model has adapters: give its base model, by name or as it was before them.")
    name = model if isinstance(model, str) else None
    config = causal_lm(model).config if name is None else load_config(name, "feature_model", revision=revision)
    check_config(config, completions=0)  # each is a row of its own
    top = max(layer_indices(layers, config.get_text_config().num_hidden_layers))
    _check_vocabulary(config, name, revision, tokenizer)
    if name is None:
        decoder = copy.deepcopy(decoder_up_to(causal_lm(model).base_model, top))
    else:
        options: dict[str, Any] = {"revision": revision, **attention_options(config)}
        decoder = decoder_up_to(read_weights(name, config, dtype, options, "feature_model").base_model, top)
    return FeatureNetwork(decoder.requires_grad_(False).eval(), layers, pooling, norm, reduction)


def _check_vocabulary(
    config: PreTrainedConfig, name: str | None, revision: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    size = config.get_text_config().vocab_size
    differs = len(tokenizer) > size
    if name is not None:
        with suppress(ValueError):  # saved without a tokenizer: then the size decides
            differs |= load_tokenizer(name, revision).get_vocab() != tokenizer.get_vocab()
    if differs:
        raise ValueError(
            f"feature_model={name or 'a model'} has another vocabulary ({size} tokens) than processing_class "
            f"({len(tokenizer)}): use a feature network of the policy's family."
        )
