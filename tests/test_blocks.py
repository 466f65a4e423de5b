"""Where the blocks lie and who may attend to whom: reference layouts, a slow oracle, and properties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from ebft.blocks import BlockLayout, document_spans
from ragged import PROPERTY, doc_ids_of, documents, layouts, marks, random_tokens, sizes

FIXTURES = Path(__file__).parent / "fixtures"
CASES = {  # P, context_length, stride, completion_length, num_blocks
    "plain": (40, 8, 8, 8, 4),
    "overlap": (36, 4, 2, 4, 15),
    "docs": (48, 8, 8, 8, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_reference_layout(case):
    length, context_length, stride, completion_length, num_blocks = CASES[case]
    expected = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / f"layout_{case}.npz").items()}
    layout = BlockLayout(length, stride, context_length, completion_length)
    assert layout.num_blocks == num_blocks
    doc_ids = expected["doc_ids"] if case == "docs" else None
    assert torch.equal(layout.position_ids(1, doc_ids), expected["position_ids"])
    assert torch.equal(layout.attention_mask(1, doc_ids), expected["mask"])
    if doc_ids is not None:
        assert torch.equal(layout.attention_mask(1, doc_ids[None])[0], expected["mask"])
        assert torch.equal(layout.position_ids(1, doc_ids[None])[0], expected["position_ids"])


@PROPERTY
@given(sizes=sizes, slack=st.integers(0, 12))
def test_regular_layout(sizes, slack):
    P = sizes["context_length"] + sizes["completion_length"] + slack
    layout = BlockLayout(length=P, **sizes)
    K = (P - sizes["completion_length"] - sizes["context_length"]) // sizes["stride"] + 1
    assert layout.num_blocks == K
    assert layout.anchors.tolist() == [sizes["context_length"] + k * sizes["stride"] for k in range(K)]
    assert layout.valid.all()
    # One full document per row is the same thing.
    rows = BlockLayout.from_documents(torch.zeros(2, P, dtype=torch.long), **sizes)
    for mine, theirs in zip(rows.expand(2), layout.expand(2), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(rows.attention_mask(2), layout.attention_mask(2).expand(2, -1, -1))
    assert torch.equal(rows.position_ids(2), layout.position_ids(2).expand(2, -1))


@PROPERTY
@given(data=st.data(), doc_ids=documents(), sizes=sizes)
def test_from_documents_is_the_oracle(data, doc_ids, sizes):
    starts = data.draw(st.none() | marks(doc_ids))
    ends = None if starts is None else data.draw(st.none() | marks(doc_ids))
    layout = BlockLayout.from_documents(doc_ids, starts=starts, ends=ends, **sizes)
    counts = []
    for b, docs in enumerate(doc_ids):
        expected = oracles.anchors(
            docs, starts=None if starts is None else starts[b], ends=None if ends is None else ends[b], **sizes
        )
        valid = layout.valid[b]
        found = list(zip(layout.anchors[b][valid].tolist(), layout.prefix_starts[b][valid].tolist(), strict=True))
        assert found == expected
        assert valid.tolist() == [True] * len(found) + [False] * (layout.num_blocks - len(found))
        counts.append(len(found))
    assert layout.num_blocks == max(counts)


@PROPERTY
@given(layout=layouts())
def test_every_block_stays_within_its_document(layout):
    docs = layout.doc_ids
    assert ((layout.anchors >= 1) & (layout.anchors < max(layout.length, 2))).all(), "usable as an index, valid or not"
    for b, _, start, anchor in oracles.blocks_of(layout, len(docs)):
        seen = docs[b, start : anchor + layout.completion_length]
        assert len(seen) == anchor - start + layout.completion_length
        assert seen[0] >= 0 and (seen == seen[0]).all()
        assert start == 0 or docs[b, start - 1] != seen[0]
        assert anchor - start >= layout.context_length


@PROPERTY
@given(doc_ids=documents(), sizes=sizes, n=st.integers(1, 3))
def test_packed_row_is_its_documents_apart(doc_ids, sizes, n):
    G = sizes["completion_length"]
    layout = BlockLayout.from_documents(doc_ids, **sizes)
    mask, positions = layout.attention_mask(n), layout.position_ids(n)
    assert mask.shape == (len(doc_ids), *(layout.length + layout.num_blocks * n * G,) * 2)
    for b, docs in enumerate(doc_ids):
        seen = torch.zeros_like(mask[b])
        for begin, end in document_spans(docs):
            mine = (layout.prefix_starts[b] == begin) & layout.valid[b]
            packed = layout.length + torch.arange(layout.num_blocks * n * G).view(-1, n * G)[mine].flatten()
            here = torch.cat([torch.arange(begin, end), packed])
            if mine.any():
                alone = BlockLayout(length=end - begin, **sizes)
                assert torch.equal(mask[b][here][:, here], alone.attention_mask(n))
                assert torch.equal(positions[b][here], alone.position_ids(n))
            else:
                assert torch.equal(mask[b][here][:, here], torch.ones(end - begin, end - begin).tril().bool())
            seen[here[:, None], here] = True
        tokens = torch.cat([docs >= 0, layout.valid[b].repeat_interleave(n * G)])
        assert not (mask[b] & ~seen)[tokens].any(), "a token sees another document, padding or another rollout"


@PROPERTY
@given(data=st.data(), layout=layouts())
def test_select(data, layout):
    B, K = layout.valid.shape
    row = st.lists(st.booleans(), min_size=K, max_size=K)
    keep = torch.tensor(data.draw(st.lists(row, min_size=B, max_size=B)), dtype=torch.bool).view(B, K)
    kept = layout.select(keep)
    assert kept.num_blocks == int((keep & layout.valid).sum(-1).max())
    for b in range(B):
        for name in ("anchors", "prefix_starts"):
            expected = getattr(layout, name)[b][keep[b] & layout.valid[b]]
            assert torch.equal(getattr(kept, name)[b][kept.valid[b]], expected)
    assert (kept.anchors[~kept.valid] == 1).all()
    assert torch.equal(kept.doc_ids, layout.doc_ids)


@PROPERTY
@given(layout=layouts())
def test_references(layout):
    B = len(layout.doc_ids)
    input_ids = torch.arange(B * layout.length).view(B, -1)
    expected = torch.full((B, layout.num_blocks, layout.completion_length), -100)
    for b, k, _, anchor in oracles.blocks_of(layout, B):
        expected[b, k] = input_ids[b, anchor : anchor + layout.completion_length]
    assert torch.equal(layout.references(input_ids), expected)


def test_references_of_a_regular_layout():
    layout = BlockLayout(length=7, stride=2, context_length=2, completion_length=3)
    assert layout.references(torch.arange(14).view(2, 7)).tolist() == [
        [[2, 3, 4], [4, 5, 6]],
        [[9, 10, 11], [11, 12, 13]],
    ]
    assert random_tokens(layout, 2, 4).shape == (2, 2, 4, 3)


@pytest.mark.parametrize(
    ("docs", "message"),
    [
        ([[0, 0, 1, 0]], "row 0.*one contiguous run"),
        ([[0, 0, 0, 0], [-1, 0, 0, 0]], "row 1.*pad on the right"),
        ([[0, -1, -1, 1]], "row 0.*pad on the right"),
    ],
)
def test_bad_documents(docs, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.from_documents(torch.tensor(docs), stride=1, context_length=1, completion_length=1)


def test_no_room_for_a_block():
    with pytest.raises(ValueError, match="completion_length=4 .*context_length=7 .*length=10"):
        BlockLayout(length=10, stride=1, context_length=7, completion_length=4)
    assert BlockLayout(length=11, stride=1, context_length=7, completion_length=4).num_blocks == 1
    none = BlockLayout.from_documents(doc_ids_of([[10, 10]]), stride=1, context_length=7, completion_length=4)
    assert none.num_blocks == 0 and none.attention_mask(3).shape == (1, 20, 20)


@pytest.mark.parametrize("name", ["length", "stride", "context_length", "completion_length"])
def test_size_out_of_range(name):
    sizes = dict(length=20, stride=2, context_length=2, completion_length=2)
    with pytest.raises(ValueError, match=f"{name}=0"):
        BlockLayout(**sizes | {name: 0})
    if name != "length":
        del sizes["length"]
        with pytest.raises(ValueError, match=f"{name}=0"):
            BlockLayout.from_documents(doc_ids_of([[20]]), **sizes | {name: 0})
