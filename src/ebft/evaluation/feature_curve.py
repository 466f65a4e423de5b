"""Feature-matching loss as a function of completion length, from full-length rollouts (paper, Fig. 1-2).

Rollouts are as long as the longest length, and each length's feature is read at its last token in the same forward: a
token's features depend only on the tokens up to it, so that they are those of the shorter rollout.
Shape letters: B documents (rows), K contexts of a document, N rollouts, G tokens of the longest rollout, D features.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise
from ..blocks import BlockLayout
from ..features import FeatureNetwork
from ..layouts import completion_borders
from ..rewards import feature_matching_loss
from ..rollout import sample_blocks
from .batches import batches_of
from .intervals import DocumentMean, Estimate

LENGTHS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class FeatureCurve:
    """Unbiased conditional feature-matching loss (eq 2) of every context at every completion length.

    Attributes:
        lengths: Completion lengths, in tokens.
        values: float64 [contexts, lengths]; a single value may be negative.
        documents: LongTensor [contexts]: `document_id` of each context's document.
    """

    lengths: tuple[int, ...]
    values: Tensor
    documents: Tensor

    def by_document(self) -> DocumentMean:
        """Sums over the contexts of each document [M, lengths]; two models' can be subtracted."""
        documents, index, counts = self.documents.unique(return_inverse=True, return_counts=True)
        sums = self.values.new_zeros(len(documents), len(self.lengths)).index_add_(0, index, self.values)
        return DocumentMean(sums, counts.double())

    def estimate(self) -> Estimate:
        """Mean over contexts and its 95 % bootstrap interval over documents, [lengths] each."""
        return self.by_document().estimate()


@torch.no_grad()
def feature_matching_curve(
    model: nn.Module,
    feature_network: FeatureNetwork,
    documents: Iterable[dict[str, Any]],
    lengths: Sequence[int] = LENGTHS,
    *,
    num_generations: int = 8,
    contexts_per_document: int = 4,
    context_length: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> FeatureCurve:
    """How far a model's rollouts are from held-out text, by rollout length: features of the last token, not whitened.

    Models are comparable if all arguments but `model` are equal, the feature network above all; they then also share
    their random numbers. Part of the loss is the variance of the text itself, the same for all models.

    Args:
        model: The causal LM that writes.
        feature_network: The frozen phi. Its pooling is not used.
        documents: Rows of `ebft.data.tokenize_documents`. Those too short for a context are left out.
        lengths: Completion lengths, in tokens.
        num_generations: N, rollouts per context; the estimate is unbiased for any N >= 2.
        contexts_per_document: At most so many, spread evenly over the places where a whole reference follows: in raw
            text from `context_length` tokens on, else within completions, the first one behind the prompt.
        context_length: Shortest prefix, in tokens.
        temperature: Of the rollouts.
        seed: Of the rollouts.
        batch_size: Documents per forward.

    Raises:
        ValueError: A number is out of range, or no document has room for the longest completion.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={tuple(lengths)} must name completion lengths of at least 1 token.")
    if num_generations < 2:
        raise ValueError(
            f"num_generations={num_generations}: an unbiased loss needs pairs of rollouts, use at least 2."
        )
    network = copy.copy(feature_network)
    network.pooling = "token"
    values, owners = [torch.zeros(0, len(lengths), dtype=torch.float64)], [torch.zeros(0, dtype=torch.long)]
    for batch in batches_of(documents, batch_size, next(model.parameters()).device):
        layout = contexts(batch, contexts_per_document, context_length, max(lengths))
        uniforms = noise.sampling_uniforms(
            layout, batch["document_ids"].cpu(), num_generations, seed=seed, purpose=noise.EVALUATION, step=0
        )
        tokens = sample_blocks(
            model, batch["input_ids"], layout, num_generations, temperature=temperature, uniforms=uniforms
        )
        values.append(curve_values(network, batch["input_ids"], tokens, layout, lengths))
        owners.append(batch["document_ids"].cpu().expand_as(layout.valid)[layout.valid])
    curve = FeatureCurve(tuple(lengths), torch.cat(values), torch.cat(owners))
    if not len(curve.values):
        raise ValueError(
            f"documents: none has room for {max(lengths)} tokens behind a prefix of context_length={context_length}: "
            "use longer documents or shorter lengths."
        )
    return curve


def contexts(batch: dict[str, Tensor], per_document: int, context_length: int, completion_length: int) -> BlockLayout:
    """At most `per_document` blocks in each row, spread evenly from the first place where one fits to the last."""
    doc_ids = batch["doc_ids"].cpu()
    starts, ends = completion_borders(batch["completion_mask"].cpu(), doc_ids)
    layout = BlockLayout.from_documents(
        doc_ids,
        stride=1,
        context_length=context_length,
        completion_length=completion_length,
        starts=starts,
        ends=ends,
    )
    keep = torch.zeros_like(layout.valid)
    for row, count in enumerate(layout.valid.sum(-1).tolist()):
        if count:
            keep[row, torch.linspace(0, count - 1, min(count, per_document)).round().long()] = True
    return layout.select(keep) if layout.num_blocks else layout


def curve_values(
    network: FeatureNetwork, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, lengths: Sequence[int]
) -> Tensor:
    """Unbiased losses [contexts, lengths] on the CPU, of rollouts [B, K, N, G]; `network` pools per token."""
    generated, reference = network(input_ids, tokens, layout)  # [B, K, G, N, D], [B, K, G, D]
    last = torch.tensor(lengths, device=generated.device) - 1
    losses = feature_matching_loss(generated[:, :, last], reference[:, :, last])
    return losses.cpu()[layout.valid]
