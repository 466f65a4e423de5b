"""Where a document is continued: the first place with room for the longest rollout, and others at random behind it."""

import torch
from torch import Tensor

from .. import noise
from ..blocks import BlockLayout
from ..layouts import completion_borders
from .settings import DocumentSettings


def random_contexts(
    batch: dict[str, Tensor], per_document: int, context_length: int, completion_length: int, seed: int
) -> BlockLayout:
    """At most `per_document` contexts of each row; a function of the seed and the document alone.

    Never at a fixed distance from the document's end: the last tokens of such references would be the document's
    last words and its EOS, and no draws from what follows the context. A place whose reference ends with the document,
    or with its turn of a conversation, is left out for the same reason, unless it is the first.

    Args:
        batch: Of `batches_of`.
        per_document: How many.
        context_length: Shortest prefix, in tokens.
        completion_length: Room behind each context, in tokens.
        seed: Of the choice.
    """
    everywhere = all_contexts(batch, context_length, completion_length)
    if not everywhere.num_blocks:
        return everywhere
    keep = torch.zeros_like(everywhere.valid)
    _, ends = completion_borders(batch["completion_mask"].cpu(), batch["doc_ids"].cpu())
    last = (everywhere.anchors + completion_length - 1).clamp(max=ends.shape[1] - 1)
    inner = everywhere.valid & ~ends.gather(1, last)
    for row, document_id in enumerate(batch["document_ids"][:, 0].tolist()):
        rng = noise.document_rng(seed, noise.CONTEXTS, 0, document_id)
        others = rng.permutation(1 + inner[row, 1:].nonzero().flatten().numpy())[: per_document - 1]
        keep[row, torch.tensor([0, *others])] = True
    return everywhere.select(keep)


def contexts_of(batch: dict[str, Tensor], settings: DocumentSettings) -> BlockLayout:
    """Where the documents of a batch are continued."""
    places = settings.contexts_per_document, settings.context_length, max(settings.lengths)
    return random_contexts(batch, *places, settings.seed)


def all_contexts(batch: dict[str, Tensor], context_length: int, completion_length: int) -> BlockLayout:
    """Every place of a completion, or of raw text, with so many tokens before and behind it."""
    doc_ids = batch["doc_ids"].cpu()
    starts, ends = completion_borders(batch["completion_mask"].cpu(), doc_ids)
    return BlockLayout.from_documents(
        doc_ids,
        stride=1,
        context_length=context_length,
        completion_length=completion_length,
        starts=starts,
        ends=ends,
    )


def behind_prompt(batch: dict[str, Tensor], layout: BlockLayout) -> Tensor:
    """Whether a document has a prompt and its first context is the one right behind it: BoolTensor [B]."""
    mask = batch["completion_mask"].cpu()
    if not layout.num_blocks:
        return torch.zeros(len(mask), dtype=torch.bool)
    first = mask.int().argmax(-1)
    anchors, valid, _ = layout.expand(len(mask))
    return valid[:, 0] & (anchors[:, 0] == first) & (first > 0)
