"""Small batches of every shape: padded, packed and full rows; fixed ones, and hypothesis strategies."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ebft.blocks import BlockLayout

# The same examples at every run, and nothing written to disk.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def doc_ids_of(rows: list[list[int]], length: int | None = None) -> Tensor:
    """`doc_ids` [B, P] of rows of documents of the given lengths, padded on the right."""
    out = torch.full((len(rows), length or max(map(sum, rows))), -1)
    for row, lengths in enumerate(rows):
        docs = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        out[row, : len(docs)] = docs
    return out


def ragged_batch(vocab_size: int = 61, seed: int = 1) -> tuple[Tensor, BlockLayout]:
    """`input_ids` [3, 22] and a layout with K = 4: a padded row, a packed and padded one, a full one."""
    doc_ids = doc_ids_of([[15], [9, 11], [22]])
    layout = BlockLayout.from_documents(doc_ids, stride=4, context_length=3, completion_length=4)
    assert layout.valid.sum(-1).tolist() == [3, 3, 4]
    ids = torch.randint(3, vocab_size, doc_ids.shape, generator=torch.Generator().manual_seed(seed))
    return ids, layout


def random_tokens(
    layout: BlockLayout, batch_size: int, num_generations: int, vocab_size: int = 61, seed: int = 2
) -> Tensor:
    """Rollouts [B, K, N, G] of random tokens."""
    shape = (batch_size, layout.num_blocks, num_generations, layout.completion_length)
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


sizes = st.fixed_dictionaries(
    {"stride": st.integers(1, 5), "context_length": st.integers(1, 5), "completion_length": st.integers(1, 5)}
)


@st.composite
def documents(draw) -> Tensor:
    """`doc_ids` [B, P] of up to three rows of up to three documents, with padding."""
    rows = draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=3))
    return doc_ids_of(rows, max(map(sum, rows)) + draw(st.integers(0, 3)))


@st.composite
def marks(draw, doc_ids: Tensor) -> Tensor:
    """A BoolTensor like `doc_ids`, True at a few tokens."""
    B, P = doc_ids.shape
    rows = st.lists(st.sampled_from([False, False, False, True]), min_size=P, max_size=P)
    return torch.tensor(draw(st.lists(rows, min_size=B, max_size=B)))


@st.composite
def layouts(draw) -> BlockLayout:
    """Any layout from documents, of blocks everywhere or of completions only; K may be 0."""
    doc_ids = draw(documents())
    starts = draw(st.none() | marks(doc_ids))
    ends = None if starts is None else draw(st.none() | marks(doc_ids))
    return BlockLayout.from_documents(doc_ids, starts=starts, ends=ends, **draw(sizes))
