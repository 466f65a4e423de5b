"""What is measured of each model on the held-out documents, and how it writes."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import BlockLayout
from ..evaluation import DocumentMean, DocumentSettings, document_means
from ..features import FeatureNetwork
from ..rollout import sample_blocks

PROMPT_LENGTH, CONTINUATION_LENGTH = 48, 48  # tokens


def measure(
    models: Mapping[str, PreTrainedModel], network: FeatureNetwork, documents: list[Any], settings: DocumentSettings
) -> dict[str, dict[str, DocumentMean]]:
    """Everything that `settings` names, of each model, with equal noise for all."""
    measured = {}
    with Progress() as progress:
        for name, model in models.items():
            task = progress.add_task(f"{name:>10}", total=len(documents))
            measured[name] = document_means(
                model, network, documents, settings, advance=lambda count, task=task: progress.advance(task, count)
            )
    return measured


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
