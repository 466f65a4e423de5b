"""What is measured of each model on the held-out documents, and how it writes."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import BlockLayout
from ..evaluation import DocumentMean, cross_entropy, feature_matching_curve
from ..evaluation.feature_curve import LENGTHS
from ..features import FeatureNetwork
from ..rollout import sample_blocks

PROMPT_LENGTH, CONTINUATION_LENGTH = 48, 48  # tokens


def measure(
    name: str, model: PreTrainedModel, feature_network: FeatureNetwork, documents: list[Any], num_generations: int
) -> dict[str, DocumentMean]:
    """Cross-entropy [M] and feature-matching loss at each of `LENGTHS` [M, L]; equal noise for every model."""
    curve = feature_matching_curve(
        model,
        feature_network,
        track(documents, description=f"{name:>10} feature-matching loss"),
        num_generations=num_generations,
    )
    entropy = cross_entropy(model, track(documents, description=f"{name:>10} cross-entropy        "))["all"]
    return {"cross_entropy": entropy, "feature_matching_loss": curve.by_document()}


def summarise(measured: dict[str, dict[str, DocumentMean]]) -> list[dict[str, Any]]:
    """One row per model, or pair of models, and number: mean and 95 % interval over documents.

    Pairs are differences on the same documents with the same noise, in which what the models share cancels.
    """
    parts = dict(measured)
    for one, other in combinations(measured, 2):
        parts[f"{other} - {one}"] = {key: measured[other][key] - measured[one][key] for key in measured[one]}
    rows = []
    for name, means in parts.items():
        for measure, lengths in (("cross_entropy", (None,)), ("feature_matching_loss", LENGTHS)):
            estimate = torch.stack(means[measure].estimate()).view(3, -1).T.tolist()
            for length, (mean, low, high) in zip(lengths, estimate, strict=True):
                rows.append(dict(model=name, measure=measure, length=length, mean=mean, low=low, high=high))
    return rows


def continuations(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, documents: list[Any], temperature: float
) -> list[dict[str, str]]:
    """How each model goes on from the same prompts with the same noise, beside the held-out text itself."""
    input_ids = torch.tensor([document["input_ids"] for document in documents])
    layout = BlockLayout(input_ids.shape[1], input_ids.shape[1], PROMPT_LENGTH, CONTINUATION_LENGTH)
    written = {"held-out text": layout.references(input_ids)[:, 0]}
    for name, model in models.items():
        generator = torch.Generator().manual_seed(0)
        tokens = sample_blocks(model, input_ids, layout, 1, temperature=temperature, generator=generator)
        written[name] = tokens[:, 0, 0]
    prompts = tokenizer.batch_decode(input_ids[:, :PROMPT_LENGTH])
    texts = {name: tokenizer.batch_decode(tokens) for name, tokens in written.items()}
    return [{"prompt": prompt, **{name: texts[name][i] for name in texts}} for i, prompt in enumerate(prompts)]
