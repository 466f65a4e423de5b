"""Features of whole completions: a frozen network over prompt + completion, in plain causal batches.

Where blocks share one packed run of their document, here every completion is a row of its own, of any length. Shape
letters: M completions, T tokens of the longest row of a batch, D features.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..features import NORMS, REDUCTIONS, FeatureNetwork, decoder_up_to, layer_indices, tapped
from ..forward import causal_lm
from ..models import attention_options, load_config, load_tokenizer
from ..support import check_config

POOLINGS = ("last_token", "mean_pooling")  # the others need completions of one length


class Completion(NamedTuple):
    """A completion and the prompt before it, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of both together."""
        return len(self.prompt) + len(self.completion)


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
    check_config(config)
    top = max(layer_indices(layers, config.get_text_config().num_hidden_layers))
    _check_vocabulary(config, name, revision, tokenizer)
    if name is None:
        decoder = copy.deepcopy(decoder_up_to(causal_lm(model).base_model, top))
    else:
        options: dict[str, Any] = {"revision": revision, "dtype": dtype, **attention_options(config)}
        decoder = decoder_up_to(AutoModelForCausalLM.from_pretrained(name, **options).base_model, top)
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


@torch.no_grad()
def completion_features(network: FeatureNetwork, completions: Sequence[Completion], batch_size: int) -> Tensor:
    """Pooled features of completions, [M, D]: of the last token of each, or the mean over its tokens.

    Equal completions have equal features to the last bit, since each is run once: whitening would blow the rounding
    noise between them up into a direction of its own.

    Args:
        network: With pooling `last_token` or `mean_pooling`.
        completions: Of at least one token each.
        batch_size: Rows of a forward.

    Raises:
        ValueError: A row is longer than the network has positions, or a feature is not finite.
    """
    different = sorted(dict.fromkeys(completions), key=lambda completion: completion.num_tokens)
    _check_length(network, different[-1].num_tokens)
    features: dict[Completion, Tensor] = {}
    for start in range(0, len(different), batch_size):
        batch = different[start : start + batch_size]
        features.update(zip(batch, _features_of(network, batch), strict=True))
    found = torch.stack([features[completion] for completion in completions])
    if not torch.isfinite(found).all():  # a reward that is not a number, TRL would take for one that was not given
        raise ValueError("The features of a completion are not finite: load feature_model in bfloat16 or float32.")
    return found


def _features_of(network: FeatureNetwork, batch: Sequence[Completion]) -> list[Tensor]:
    """One run of a batch, [D] each."""
    # Padded on the right, where a causal network's tokens do not see it: a mask would only rule out fast kernels.
    rows = [torch.tensor(prompt + completion) for prompt, completion in batch]
    ids = pad_sequence(rows, batch_first=True).to(network.decoder.device)
    taps = tapped(
        network.decoder,
        network.layer_indices,
        lambda: network.decoder(input_ids=ids, use_cache=False).last_hidden_state,
    )
    features = []
    for index, completion in enumerate(batch):
        end = completion.num_tokens
        start = end - 1 if network.pooling == "last_token" else len(completion.prompt)
        features.append(network.token_features([tap[index, start:end] for tap in taps]).mean(0))
    return features


def _check_length(network: FeatureNetwork, longest: int) -> None:
    positions = getattr(network.decoder.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"A prompt with its completion has {longest} tokens and the feature network {positions} positions: "
            "leave out long prompts, or lower max_completion_length."
        )
