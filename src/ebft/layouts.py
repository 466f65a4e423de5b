"""The blocks of a batch: where completions start, and which blocks this visit takes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import noise
from .blocks import PADDING, BlockLayout
from .config import EBFTConfig


def batch_layout(batch: dict[str, Any], args: EBFTConfig, anchors: str, step: int | None) -> BlockLayout:
    """Lay out the blocks of a collated batch.

    Args:
        batch: `input_ids`, `doc_ids`, `completion_mask` [B, P] and `document_ids` [B, M], as `data.BlockCollator`
            makes them.
        args: Sizes, and the random choices `max_blocks` and `random_anchor_offset`.
        anchors: `completion` or `all`.
        step: Optimiser step of this visit; None in evaluation, which takes every block.

    Returns:
        A layout with `doc_ids`.
    """
    if args.rollout == "completion":
        layout = _completions(batch, args.max_completion_length, args.stop_token_ids or ())
    else:
        layout = _blocks(batch, args, anchors, step)
    if step is not None and args.max_blocks is not None:
        ids = batch["document_ids"].cpu()
        layout = noise.random_subset(layout, ids, args.max_blocks, seed=args.seed, step=step)
    return layout


def _blocks(batch: dict[str, Any], args: EBFTConfig, anchors: str, step: int | None) -> BlockLayout:
    doc_ids, ids = batch["doc_ids"].cpu(), batch["document_ids"].cpu()
    starts, ends = None, None
    if anchors == "completion":
        starts, ends = completion_borders(batch["completion_mask"].cpu(), doc_ids)
    if step is not None and args.random_anchor_offset:
        if starts is None:
            starts = first_anchors(doc_ids, args.context_length)
        starts = noise.shift_starts(starts, ends, doc_ids, ids, args.stride, seed=args.seed, step=step)
    return BlockLayout.from_documents(
        doc_ids,
        stride=args.stride,
        context_length=args.context_length,
        completion_length=args.completion_length,
        starts=starts,
        ends=ends,
    )


def _completions(batch: dict[str, Any], longest: int, stop_token_ids: Sequence[int]) -> BlockLayout:
    """One block per whole completion: one that was cut has no end to compare with."""
    doc_ids, mask = batch["doc_ids"].cpu(), batch["completion_mask"].cpu()
    starts, _ = completion_borders(mask, doc_ids)
    ends = torch.isin(batch["input_ids"].cpu(), torch.tensor(list(stop_token_ids))) & mask & (doc_ids >= 0)
    return BlockLayout.from_completions(doc_ids, starts, ends, longest)


def joined_layout(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """The rows of several layouts from documents in one, for sampling: what each block stands for is left out."""
    doc_ids = stacked([x.doc_ids for x in layouts if x.doc_ids is not None], PADDING)
    return replace(
        layouts[0],
        length=doc_ids.shape[1],
        anchors=stacked([x.anchors for x in layouts], 1),
        valid=stacked([x.valid for x in layouts], False),
        prefix_starts=stacked([x.prefix_starts for x in layouts], 0),
        doc_ids=doc_ids,
        multiplicity=None,
        reference_lengths=None,
    )


def stacked(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors [B, L], one below the other, padded on the right to the longest."""
    longest = max(x.shape[1] for x in tensors)
    return torch.cat([pad(x, (0, longest - x.shape[1]), value=value) for x in tensors])


def no_rollouts(inputs: dict[str, Any]) -> tuple[Tensor, BlockLayout]:
    """Tokens [B, 0, 1, G] and layout of a batch that has no blocks, for its cross-entropy alone."""
    layout = inputs["layout"].select(torch.zeros_like(inputs["layout"].valid))
    return inputs["input_ids"].new_zeros(len(layout.anchors), 0, 1, layout.completion_length), layout


def documents_without_block(inputs: dict[str, Any]) -> Tensor:
    """How many documents of a batch with its `layout` have none, as a scalar."""
    documents = (inputs["document_ids"] >= 0).sum().cpu()
    return documents - len(noise.documents_with_blocks(inputs["layout"]))


def completion_borders(completion_mask: Tensor, doc_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token of each run of completion tokens within a document: two BoolTensors [B, P]."""
    inside = completion_mask & (doc_ids >= 0)
    goes_on = torch.zeros_like(inside)  # token p and its successor are of the same completion
    goes_on[:, :-1] = inside[:, :-1] & inside[:, 1:] & (doc_ids[:, :-1] == doc_ids[:, 1:])
    went_on = torch.zeros_like(inside)
    went_on[:, 1:] = goes_on[:, :-1]
    return inside & ~went_on, inside & ~goes_on


def first_anchors(doc_ids: Tensor, context_length: int) -> Tensor:
    """The token `context_length` behind each document's first, where it is that long: BoolTensor [B, P]."""
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    moved = torch.zeros_like(begins)
    moved[:, context_length:] = begins[:, :-context_length]
    same_document = torch.zeros_like(begins)
    same_document[:, context_length:] = doc_ids[:, context_length:] == doc_ids[:, :-context_length]
    return moved & same_document & (doc_ids >= 0)
