"""Features of whole completions, each a row of its own behind its prompt, in plain causal batches.

Blocks share one packed run of their document; this is for completions that have no document to share. Shape letters: M
completions, T tokens of the longest row of a batch, D features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .features import FeatureNetwork, tapped


class Completion(NamedTuple):
    """A completion and the prompt before it, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of both together."""
        return len(self.prompt) + len(self.completion)


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
