"""Flex attention's masks and tiles against the definition; its kernels are tested where there is a GPU (test_gpu)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import test_attention
from ebft import flex
from ebft.attention import BlockPlan
from ebft.blocks import BlockLayout
from ragged import PROPERTY, layouts, ragged_batch

N = 3


def plans(layout: BlockLayout, rows: int) -> list[BlockPlan]:
    """The forwards of an update: the packed row, every step of decoding, and the documents alone."""
    n, G = N if layout.num_blocks else 0, layout.completion_length
    steps = [BlockPlan(layout, rows, n, range(t, t + 1), decoding=True) for t in range(G if n else 0)]
    return [BlockPlan(layout, rows, n, range(G)), BlockPlan(layout, rows, 0, range(0)), *steps]


def seen(mask, rows: int) -> torch.Tensor:
    """BoolTensor [B, T, M]: the mask of every pair by itself."""
    (queries, keys), q_at = mask.seq_lengths, torch.arange(mask.seq_lengths[0])[:, None]
    return mask.mask_mod(torch.arange(rows)[:, None, None], 0, q_at, torch.arange(keys)).expand(rows, queries, keys)


def definition(plan: BlockPlan, window: int | None) -> torch.Tensor:
    """The same by `BlockLayout.attention_mask`, whose tokens are in (block, rollout, step) order."""
    layout, rows, P, steps = plan.layout, len(plan.anchors), plan.prefix_length, plan.query_steps.stop
    R, n = plan.anchors.shape[1], plan.anchors.shape[1] // max(1, layout.num_blocks)
    G = layout.completion_length
    at = P + torch.arange(R)[:, None] * G + torch.arange(steps)  # [R, steps]
    keys = torch.cat([torch.arange(P), at.T.flatten() if plan.decoding else at.flatten()])
    queries = at[:, -1] if plan.decoding else keys
    mask = layout.attention_mask(n).expand(rows, -1, -1)[:, queries][:, :, keys]
    position = layout.position_ids(n).expand(rows, -1)
    near = position[:, queries][:, :, None] - position[:, keys][:, None, :] < (window or layout.length * 2)
    return mask & near


@PROPERTY
@given(layout=layouts(), tile=st.sampled_from([2, 5, 16]), window=st.none() | st.integers(1, 9))
def test_mask_and_tiles_are_those_of_the_definition(layout, tile, window):
    rows = len(layout.doc_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "TILE", tile)
        for plan in plans(layout, rows):
            mask = flex.block_mask(plan, window)
            pairs, expected = seen(mask, rows), definition(plan, window)
            real = real_queries(plan)
            assert torch.equal(pairs[real], expected[real])
            assert pairs.any(-1).all(), "a query that sees nothing has no softmax"
            check_tiles(mask, pairs, tile)


def real_queries(plan: BlockPlan) -> torch.Tensor:
    """BoolTensor [B, T]: queries that are neither padding nor of a block that is not there."""
    valid = plan.valid.repeat_interleave(len(plan.query_steps), 1)
    return valid if plan.decoding else torch.cat([plan.layout.doc_ids >= 0, valid], 1)


def check_tiles(mask, pairs: torch.Tensor, tile: int) -> None:
    """No pair that is seen is skipped, and no tile that is not masked hides one."""
    T, M = mask.seq_lengths
    counts, tiles = mask.kv_num_blocks, mask.kv_indices
    rows = pairs.shape[0]
    computed = torch.zeros(rows, -(-T // tile), -(-M // tile), dtype=torch.bool)
    whole = computed.clone()
    for found, number, index in (
        (computed, counts, tiles),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for b in range(rows):
            for i in range(found.shape[1]):
                at = b if len(number) > 1 else 0
                found[b, i, index[at, 0, i, : number[at, 0, i]].long()] = True
    assert not (computed & whole).any(), "no tile twice"
    for b, i, j in (~computed & ~whole).nonzero().tolist():
        assert not pairs[b, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile].any()
    for b, i, j in whole.nonzero().tolist():
        assert pairs[b, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile].all()


@PROPERTY
@given(layout=layouts(), window=st.none() | st.integers(1, 9), scaling=st.none() | st.just(0.9))
@pytest.mark.parametrize("ours", [test_attention.packed, test_attention.decoded])
def test_attention_is_dense_attention(ours, layout, window, scaling):
    """Through `attend` as a GPU would; on a CPU flex attention has no backward."""
    tensors, real = test_attention.states(layout, len(layout.doc_ids), N)
    tensors = [x.detach() for x in tensors]
    expected = test_attention.dense(tensors, layout, N, window=window, scaling=scaling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebft.attention.can_flex", lambda *args: True)
        out = ours(tensors, layout, N, window=window, scaling=scaling)
    difference = (out - expected).abs().amax((1, 3)) * real
    assert difference.max() < 1e-12


def test_no_more_tiles_than_needed():
    """At the paper's sizes: those PyTorch finds by going through all pairs, but for the last, which is not full."""
    plan = BlockPlan(BlockLayout(1024, 8, 8, 8), 2, 4, range(7))
    mask = flex.block_mask(plan, None)
    T, M = mask.seq_lengths
    assert len(mask.kv_num_blocks) == 1, "one mask where all rows are alike"
    exact = create_block_mask(mask.mask_mod, 1, None, T, M, device="cpu")
    both = [x.kv_num_blocks + x.full_kv_num_blocks for x in (mask, exact)]
    assert torch.equal(*both)
    assert torch.equal(mask.kv_num_blocks[..., :-1], exact.kv_num_blocks[..., :-1])


def test_documents_that_differ_have_masks_of_their_own():
    _, layout = ragged_batch()
    assert len(flex.block_mask(BlockPlan(layout, 3, 2, range(4)), None).kv_num_blocks) == 3


def test_not_on_a_cpu():
    query = torch.zeros(1, 2, 3, 16)
    assert not flex.can_flex(query, query, None)


def test_many_kinds_of_forwards_stay_compiled(monkeypatch):
    """More than PyTorch allows by default; were one not compiled, `fullgraph` would make it an error."""
    compiled = torch.compile(flex.flex_attention, backend="eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "_kernel", lambda kind: compiled)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    layout = BlockLayout(14, stride=3, context_length=2, completion_length=4)
    for dtype in (torch.float32, torch.float64):
        for rows in (1, 2):
            for heads, key_heads in ((4, 2), (4, 4), (6, 2)):
                for plan in plans(layout, rows)[:3]:
                    mask = flex.block_mask(plan, None)
                    T, M = mask.seq_lengths
                    query = torch.randn(rows, heads, T, 16, dtype=dtype)
                    key = torch.randn(rows, key_heads, M, 16, dtype=dtype)
                    found = flex.flex(query, key, key, mask, None)
                    shared = key.repeat_interleave(heads // key_heads, 1)
                    scores = (query @ shared.mT / 4).masked_fill(~seen(mask, rows)[:, None], float("-inf"))
                    torch.testing.assert_close(found, scores.softmax(-1) @ shared, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 8, "this many kinds would not have been compiled"
