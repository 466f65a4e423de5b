"""From documents to batches: best-fit packing, which never cuts a document, and the padding collator.

Shape letters: B rows, P tokens of the longest row, M documents of the row that has most.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100  # the label of a token that is not trained on, as everywhere in transformers
_NO_DOCUMENT = -1  # in `doc_ids` and `document_ids`: padding


def pack_documents(dataset: "Dataset | IterableDataset", max_length: int) -> "Dataset | IterableDataset":
    """Put whole documents together into rows of at most `max_length` tokens, best fit decreasing.

    Args:
        dataset: Rows of `tokenize_documents`.
        max_length: P, tokens per row; no document may be longer.

    Returns:
        Rows with `input_ids`, `completion_mask`, `loss_mask` of all their documents one after the other, and one entry
        per document in `seq_lengths` and `document_ids`.

    Raises:
        ValueError: if a document is longer than a row (for a stream: when it is reached).
    """
    from trl import pack_dataset

    # TRL packs columns with one entry per token only, so a document's id travels on each of its tokens.
    spread: Any = dataset.map(_spread_document_id, fn_kwargs={"max_length": max_length})
    return pack_dataset(spread, max_length, strategy="bfd").map(_gather_document_ids, remove_columns=["document_id"])


def _spread_document_id(row: dict[str, Any], max_length: int) -> dict[str, list[int]]:
    length = len(row["input_ids"])
    if length > max_length:
        raise ValueError(
            f"document {row['document_id']} has {length} tokens, more than max_length={max_length}, and packing never "
            "cuts a document: tokenise it with the same max_length"
        )
    return {"document_id": [row["document_id"]] * length}


def _gather_document_ids(row: dict[str, Any]) -> dict[str, list[int]]:
    starts = torch.tensor([0, *row["seq_lengths"][:-1]]).cumsum(0).tolist()
    return {"document_ids": [row["document_id"][start] for start in starts]}


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Token id to pad with: the tokenizer's, else its EOS; padding is masked everywhere, so any id would do.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError("processing_class.pad_token and .eos_token are None: set at least processing_class.eos_token")


@dataclass
class BlockCollator:
    """Batch rows of documents, packed or not: pad them on the right and say which token belongs to which document.

    Calling it with B rows of `tokenize_documents` or `pack_documents` returns CPU tensors:

    - `input_ids` LongTensor [B, P]
    - `attention_mask` LongTensor [B, P]: 1 = token, 0 = padding
    - `doc_ids` LongTensor [B, P]: 0, 1, ... in runs within the row, -1 = padding
    - `labels` LongTensor [B, P]: the token where it is trained on, else -100; -100 on the first token of a document,
      which nothing may predict
    - `completion_mask` BoolTensor [B, P]
    - `document_ids` LongTensor [B, M]: index in the dataset of each of the row's documents, -1 = none

    Attributes:
        pad_token_id: What `input_ids` is padded with (`padding_id`).
        document_masking: Keep the documents of a packed row apart; else a row counts as one document, as in the
            paper's own runs.
    """

    pad_token_id: int
    document_masking: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows, see the class."""
        if not self.document_masking:
            rows = [_as_one_document(row) if "document_ids" in row else row for row in rows]
        lengths = [torch.as_tensor(row.get("seq_lengths", [len(row["input_ids"])])) for row in rows]
        doc_ids = _pad([torch.arange(len(n)).repeat_interleave(n) for n in lengths], _NO_DOCUMENT)
        input_ids = _pad([row["input_ids"] for row in rows], self.pad_token_id)
        trained = _pad([row["loss_mask"] for row in rows], 0).bool()
        first = doc_ids != doc_ids.roll(1, dims=1)
        first[:, 0] = True
        return {
            "input_ids": input_ids,
            "attention_mask": (doc_ids != _NO_DOCUMENT).long(),
            "doc_ids": doc_ids,
            "labels": input_ids.where(trained & ~first, _IGNORED),
            "completion_mask": _pad([row["completion_mask"] for row in rows], 0).bool(),
            "document_ids": _pad([row.get("document_ids", [row.get("document_id")]) for row in rows], _NO_DOCUMENT),
        }


def _as_one_document(row: dict[str, Any]) -> dict[str, Any]:
    """A packed row whose documents see each other, known by its first."""
    return {**row, "seq_lengths": [len(row["input_ids"])], "document_ids": row["document_ids"][:1]}


def _pad(rows: list[Any], value: int) -> Tensor:
    """Right-pad lists or tensors of integers to a LongTensor [B, longest]."""
    return pad_sequence(
        [torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )
