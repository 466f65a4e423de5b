"""Packed rows hold whole documents, and batches say which token belongs to which."""

from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft.data import BlockCollator, pack_documents, padding_id
from tiny import byte_bpe_tokenizer

disable_progress_bars()


def test_packing_keeps_rows_full_and_documents_whole():
    documents = [
        {
            "input_ids": [10 * i + t for t in range(n)],
            "completion_mask": [1] * n,
            "loss_mask": [1] * n,
            "document_id": i,
        }
        for i, n in enumerate([5, 2, 3, 1, 4, 8])
    ]
    packed: Any = pack_documents(Dataset.from_list(documents), 8)
    assert packed[0].keys() == {*documents[0], "seq_lengths", "document_ids"} - {"document_id"}
    assert sorted(map(sorted, packed["seq_lengths"])) == [[1, 2, 4], [3, 5], [8]]
    with pytest.raises(ValueError, match=r"document 5 has 8 tokens, more than max_length=7"):
        pack_documents(Dataset.from_list(documents), 7)


def test_collated_batch():
    rows = [
        {
            "input_ids": [5, 6, 7, 8, 9],
            "completion_mask": [0, 1, 1, 0, 1],
            "loss_mask": [1, 1, 1, 1, 0],
            "seq_lengths": [3, 2],
            "document_ids": [7, 4],
        },
        {"input_ids": [3, 4], "completion_mask": [0, 1], "loss_mask": [0, 1], "document_id": 0},
    ]
    batch = BlockCollator(pad_token_id=99)(rows)
    expected = {
        "input_ids": [[5, 6, 7, 8, 9], [3, 4, 99, 99, 99]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "doc_ids": [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]],
        "labels": [[-100, 6, 7, -100, -100], [-100, 4, -100, -100, -100]],
        "completion_mask": [[False, True, True, False, True], [False, True, False, False, False]],
        "document_ids": [[7, 4], [0, -1]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for name, tensor in batch.items() if name != "completion_mask"} == {torch.long}


def test_padding_id():
    tokenizer = byte_bpe_tokenizer()
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set at least processing_class\.eos_token"):
        padding_id(tokenizer)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), spare=st.integers(0, 7), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_collate_pack_holds_each_document_once(lengths, spare, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(n, high):
        return torch.randint(high, (n,), generator=generator).tolist()

    documents = [
        {"input_ids": draw(n, 50), "completion_mask": draw(n, 2), "loss_mask": [0, *draw(n - 1, 2)], "document_id": i}
        for i, n in enumerate(lengths)
    ]
    packed = pack_documents(Dataset.from_list(documents), max(lengths) + spare)
    batch = BlockCollator(pad_token_id=0)(list(packed))
    found = []
    for row, ids in enumerate(batch["document_ids"].tolist()):
        doc_ids = batch["doc_ids"][row]
        assert (doc_ids[doc_ids >= 0].diff() >= 0).all()
        assert int(doc_ids.max()) + 1 == sum(i >= 0 for i in ids)
        for d, document_id in enumerate(ids):
            if document_id < 0:
                continue
            tokens, labels, completion = (
                batch[name][row][doc_ids == d] for name in ("input_ids", "labels", "completion_mask")
            )
            loss_mask = (labels != -100).int().tolist()
            assert torch.equal(labels[labels != -100], tokens[labels != -100])
            found.append(
                {
                    "input_ids": tokens.tolist(),
                    "completion_mask": completion.int().tolist(),
                    "loss_mask": loss_mask,
                    "document_id": document_id,
                }
            )
    assert sorted(found, key=lambda document: document["document_id"]) == documents


def test_without_document_masking_a_packed_row_is_one_document():
    """The paper's own setting: documents of a row see each other, and blocks may cross their borders."""
    row = {
        "input_ids": [5, 6, 7, 8, 9],
        "completion_mask": [1, 1, 1, 1, 1],
        "loss_mask": [0, 1, 1, 0, 1],
        "seq_lengths": [3, 2],
        "document_ids": [4, 7],
    }
    alone = {"input_ids": [3, 4], "completion_mask": [1, 1], "loss_mask": [0, 1], "document_id": 2}
    apart, together = (BlockCollator(0, document_masking=masked)([row, alone]) for masked in (True, False))
    assert apart["doc_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert apart["document_ids"].tolist() == [[4, 7], [2, -1]]
    assert together["doc_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]]
    assert together["document_ids"].tolist() == [[4], [2]]
    assert together["labels"].tolist() == apart["labels"].tolist()
