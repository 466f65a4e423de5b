"""All randomness of a run, as pure functions of (seed, purpose, optimiser step, document): never of a stream.

So rollouts do not depend on the micro-batch, the number of ranks, packing or the point of resume, and evaluation
leaves training's numbers untouched. Documents are known by their index in the tokenised dataset.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, M documents of a row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .blocks import BlockLayout, completion_spans, document_spans

SAMPLING, SUBSET, OFFSET, EVALUATION, CONTEXTS, FREQUENCIES = range(6)  # purposes


def document_rng(seed: int, purpose: int, step: int, document_id: int) -> np.random.Generator:
    """The random numbers of one document at one visit, for one purpose."""
    return np.random.default_rng([seed, purpose, step, document_id])


def sampling_uniforms(
    layout: BlockLayout, document_ids: Tensor, num_generations: int, *, seed: int, purpose: int, step: int
) -> Tensor:
    """One uniform in [0, 1) per generated token: [B, K, N, G], a function of each document and its blocks alone.

    Args:
        layout: From `BlockLayout.from_documents`.
        document_ids: LongTensor [B, M]: index in the dataset of each of a row's documents.
        num_generations: N.
        seed: Of the run.
        purpose: `SAMPLING` or `EVALUATION`.
        step: Optimiser step.
    """
    shape = (*layout.anchors.shape, num_generations, layout.completion_length)
    out = torch.zeros(shape, dtype=torch.float64)
    for row, doc, blocks in documents_with_blocks(layout):
        rng = document_rng(seed, purpose, step, int(document_ids[row, doc]))
        out[row, blocks] = torch.from_numpy(rng.random((len(blocks), *out.shape[2:])))
    return out


def random_subset(layout: BlockLayout, document_ids: Tensor, max_blocks: int, *, seed: int, step: int) -> BlockLayout:
    """At most `max_blocks` blocks of each document, drawn without replacement.

    Each kept block stands for as many as its document had per kept one (`layout.multiplicity`), so that sums over
    blocks stay unbiased.
    """
    keep = torch.zeros_like(layout.valid)
    multiplicity = torch.ones(layout.valid.shape, dtype=torch.float64)
    for row, doc, blocks in documents_with_blocks(layout):
        rng = document_rng(seed, SUBSET, step, int(document_ids[row, doc]))
        keep[row, blocks[torch.from_numpy(rng.permutation(len(blocks))[:max_blocks])]] = True
        multiplicity[row, blocks] = max(1.0, len(blocks) / max_blocks)
    return replace(layout, multiplicity=multiplicity).select(keep)


def shift_starts(
    starts: Tensor, ends: Tensor | None, doc_ids: Tensor, document_ids: Tensor, stride: int, *, seed: int, step: int
) -> Tensor:
    """`starts` with each document's moved right by one random 0..stride-1; those past their completion's end drop out.

    Args:
        starts: BoolTensor [B, P], first token of each completion.
        ends: BoolTensor [B, P], last token of each completion, or None: see `BlockLayout.from_documents`.
        doc_ids: LongTensor [B, P].
        document_ids: LongTensor [B, M].
        stride: s.
        seed: Of the run.
        step: Optimiser step.
    """
    shifted = torch.zeros_like(starts)
    for row, ids in enumerate(doc_ids):
        for begin, end in document_spans(ids, row):
            offset = int(document_rng(seed, OFFSET, step, int(document_ids[row, ids[begin]])).integers(stride))
            for first, last in completion_spans(begin, end, starts[row], None if ends is None else ends[row]):
                if first + offset < last:
                    shifted[row, first + offset] = True
    return shifted


def random_frequencies(dimension: int, count: int, bandwidths: Sequence[float], seed: int) -> Tensor:
    """Frequencies w ~ N(0, 1 / s^2) of random Fourier features (Rahimi & Recht 2007), float64 [dimension, count].

    The bandwidths s take turns, so that the mean over the frequencies is one over the bandwidths too.
    """
    rng = np.random.Generator(np.random.PCG64([seed, FREQUENCIES]))
    drawn = rng.standard_normal((count, dimension)) / np.resize(bandwidths, count)[:, None]
    return torch.from_numpy(drawn).T.contiguous()


def documents_with_blocks(layout: BlockLayout) -> list[tuple[int, int, Tensor]]:
    """`(row, document, indices of its valid blocks)` for every document of a batch that has any."""
    assert layout.doc_ids is not None, "a layout from documents"
    block_doc = layout.doc_ids.gather(1, layout.anchors).where(layout.valid, -1)
    return [
        (row, doc, (docs == doc).nonzero().flatten())
        for row, docs in enumerate(block_doc)
        for doc in docs.unique().tolist()
        if doc >= 0
    ]
