"""Randomness is a function of (seed, step, document) alone; where completions begin and end."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft import noise
from ebft.blocks import BlockLayout, document_spans
from ebft.config import EBFTConfig
from ebft.layouts import batch_layout, completion_borders, first_anchors
from ragged import PROPERTY, doc_ids_of, documents

SIZES = dict(stride=2, context_length=2, completion_length=3)
DOC_IDS = doc_ids_of([[9, 12], [12], [7]])
DOCUMENTS = torch.tensor([[4, 7], [7, -1], [5, -1]])  # document 7 is there twice, packed and alone
LAYOUT = BlockLayout.from_documents(DOC_IDS, **SIZES)
KEY = dict(seed=3, purpose=noise.SAMPLING, step=10)


def uniforms(layout=LAYOUT, ids=DOCUMENTS, n=4, **changes):
    return noise.sampling_uniforms(layout, ids, n, **KEY | changes)


def test_uniforms_are_a_function_of_the_document():
    out = uniforms()
    assert out.shape == (3, LAYOUT.num_blocks, 4, 3)
    assert ((out >= 0) & (out < 1)).all() and (out[~LAYOUT.valid] == 0).all()
    packed, alone = out[0][LAYOUT.prefix_starts[0] == 9], out[1][LAYOUT.valid[1]]
    assert torch.equal(packed, alone)
    assert len(out[LAYOUT.valid & (torch.arange(3) != 1)[:, None]].unique()) == 12 * int(LAYOUT.valid[[0, 2]].sum())
    # Another batch, another place in it, other padding.
    other = BlockLayout.from_documents(doc_ids_of([[3], [2, 12]], 20), **SIZES)
    again = uniforms(other, torch.tensor([[8, -1], [9, 7]]))
    assert torch.equal(again[1][other.valid[1]], alone)


def test_uniforms_leave_the_global_stream_alone():
    state = torch.get_rng_state()
    assert torch.equal(uniforms(), uniforms())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [dict(seed=4), dict(step=11), dict(purpose=noise.EVALUATION)])
def test_other_key_other_uniforms(change):
    assert not (uniforms()[LAYOUT.valid] == uniforms(**change)[LAYOUT.valid]).any()


def test_other_documents_have_other_uniforms():
    changed = uniforms(ids=torch.tensor([[4, 8], [7, -1], [5, -1]]))
    assert torch.equal(changed[1:], uniforms()[1:])
    first = LAYOUT.prefix_starts[0] == 0
    assert torch.equal(changed[0, first], uniforms()[0, first])
    assert not (changed[0, ~first] == uniforms()[0, ~first]).any()


def test_subset_is_a_function_of_the_document():
    subset = noise.random_subset(LAYOUT, DOCUMENTS, 3, seed=0, step=5)
    packed, alone = (subset.anchors[b][subset.valid[b] & (subset.prefix_starts[b] == s)] for b, s in ((0, 9), (1, 0)))
    assert torch.equal(packed - 9, alone) and len(alone) == 3
    assert (subset.valid.sum(-1) == torch.tensor([6, 3, 2])).all(), "three of every document, all of a short one"
    steps = {tuple(noise.random_subset(LAYOUT, DOCUMENTS, 3, seed=0, step=s).anchors[1].tolist()) for s in range(9)}
    assert len(steps) > 2
    assert torch.equal(noise.random_subset(LAYOUT, DOCUMENTS, 99, seed=0, step=0).anchors, LAYOUT.anchors)


def test_subset_is_unbiased():
    """Every block is taken equally often, and so is every pair."""
    steps, size, layout = 3000, 2, BlockLayout.from_documents(doc_ids_of([[13]]), **SIZES)
    K = layout.num_blocks
    taken = torch.zeros(steps, K)
    for step in range(steps):
        subset = noise.random_subset(layout, torch.tensor([[11]]), size, seed=1, step=step)
        taken[step, (subset.anchors[0] - 2) // 2] = 1
    together = taken.T @ taken / steps
    single, pair = size / K, size * (size - 1) / (K * (K - 1))
    for i in range(K):
        for j in range(K):
            expected = single if i == j else pair
            assert abs(together[i, j] - expected) < 4.5 * math.sqrt(expected * (1 - expected) / steps)


@PROPERTY
@given(doc_ids=documents(), stride=st.integers(1, 6), step=st.integers(0, 5), data=st.data())
def test_shifted_starts_stay_within_their_document(doc_ids, stride, step, data):
    ids = torch.arange(3).expand(len(doc_ids), -1) + 10 * torch.arange(len(doc_ids))[:, None]
    at = data.draw(st.integers(0, 8))
    starts = torch.zeros_like(doc_ids, dtype=torch.bool)
    spans = [(b, *span) for b, docs in enumerate(doc_ids) for span in document_spans(docs)]
    for b, begin, end in spans:
        starts[b, min(begin + at, end - 1)] = True
    shifted = noise.shift_starts(starts, None, doc_ids, ids, stride, seed=0, step=step)
    for b, begin, end in spans:
        before, after = (x[b, begin:end].nonzero().flatten().tolist() for x in (starts, shifted))
        assert len(after) <= 1
        if after:
            assert 0 <= after[0] - before[0] < stride
        else:
            assert before[0] + stride > end - begin, "a start is lost only at its document's end"
    assert not shifted[doc_ids < 0].any()


def test_shift_is_a_function_of_the_document_and_takes_every_value():
    starts, doc_ids = torch.zeros(2, 30, dtype=torch.bool), doc_ids_of([[10, 20], [20]], 30)
    starts[0, 12], starts[0, 17], starts[1, 2], starts[1, 7] = True, True, True, True
    seen = []
    for step in range(200):
        shifted = noise.shift_starts(starts, None, doc_ids, torch.tensor([[1, 2], [2, -1]]), 4, seed=0, step=step)
        assert torch.equal(shifted[0, 10:], shifted[1, :20])
        first, second = shifted[1].nonzero().flatten().tolist()
        assert second - first == 5, "one shift for all starts of a document"
        seen.append(first - 2)
    counts = torch.tensor(seen).bincount(minlength=4)
    assert len(counts) == 4 and counts.min() > 25  # 50 expected, standard deviation 6


def test_completion_borders():
    doc_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1], [0] * 12])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1], [1] * 12]).bool()
    starts, ends = completion_borders(mask, doc_ids)
    assert [x.nonzero().flatten().tolist() for x in (*starts, *ends)] == [[1, 4, 5], [0], [2, 4, 6], [11]]


@PROPERTY
@given(doc_ids=documents(), context_length=st.integers(1, 6))
def test_first_anchors(doc_ids, context_length):
    expected = torch.zeros_like(doc_ids, dtype=torch.bool)
    for b, docs in enumerate(doc_ids):
        for begin, end in document_spans(docs):
            if begin + context_length < end:
                expected[b, begin + context_length] = True
    assert torch.equal(first_anchors(doc_ids, context_length), expected)


def test_batch_layout(tmp_path):
    """Completions for prompts, everything for raw text; random choices in training only."""
    args = dict(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=32, **SIZES)
    plain = EBFTConfig(**args)
    completion = torch.zeros_like(DOC_IDS, dtype=torch.bool)
    completion[0, 4:9] = completion[0, 14:19] = completion[2, 2:6] = True
    batch = dict(doc_ids=DOC_IDS, document_ids=DOCUMENTS, completion_mask=completion)
    layout = batch_layout(batch, plain, "completion", step=0)
    assert [a[v].tolist() for a, v in zip(layout.anchors, layout.valid, strict=True)] == [[4, 6, 14, 16], [], [2]]
    everywhere = batch_layout(batch, plain, "all", step=0)
    assert torch.equal(everywhere.anchors, LAYOUT.anchors) and torch.equal(everywhere.valid, LAYOUT.valid)

    few = EBFTConfig(**args, max_blocks=1)
    assert batch_layout(batch, few, "all", step=0).valid.sum(-1).tolist() == [2, 1, 1]
    assert torch.equal(batch_layout(batch, few, "all", step=None).anchors, LAYOUT.anchors)

    moved = EBFTConfig(**args, random_anchor_offset=True)
    firsts = {int(batch_layout(batch, moved, "all", step=s).anchors[1, 0]) for s in range(20)}
    assert firsts == {2, 3}
    assert torch.equal(batch_layout(batch, moved, "all", step=None).anchors, LAYOUT.anchors)
    firsts = {int(batch_layout(batch, moved, "completion", step=s).anchors[0, 0]) for s in range(20)}
    assert firsts == {4, 5}


def test_shifted_blocks_stay_within_their_completion(tmp_path):
    """Also with several assistant turns in a row, some shorter than the shift."""
    args = EBFTConfig(
        str(tmp_path), use_cpu=True, report_to=[], max_length=32, random_anchor_offset=True, **SIZES | dict(stride=6)
    )
    turns = [[(3, 7), (9, 12), (13, 21)], [(2, 6), (15, 22)]]  # two turns may touch where a document begins
    doc_ids = doc_ids_of([[21], [8, 14]], 24)
    mask = torch.zeros_like(doc_ids, dtype=torch.bool)
    for row, spans in enumerate(turns):
        for begin, end in spans:
            mask[row, begin:end] = True
    batch = dict(doc_ids=doc_ids, document_ids=torch.tensor([[4, -1], [7, 5]]), completion_mask=mask)
    seen = set()
    for step in range(60):
        layout = batch_layout(batch, args, "completion", step)
        for row, block in layout.valid.nonzero().tolist():
            anchor = int(layout.anchors[row, block])
            own = [span for span in turns[row] if span[0] <= anchor and anchor + SIZES["completion_length"] <= span[1]]
            assert own, f"block at {anchor} of row {row} lies outside every turn"
            seen.add((row, own[0]))
    assert seen == {(row, span) for row, spans in enumerate(turns) for span in spans}
