"""Tokens of one row with their masks, before they are cut to length; and the rows that come as tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Offsets = list[tuple[int, int]]


@dataclass
class Encoded:
    """Tokens of a document with their masks.

    Attributes:
        input_ids: Tokens.
        completion_mask: 1 = token of an answer.
        trained: 1 = token to train on.
        text: What was tokenised, and
        offsets: the characters of it that each token stands for; only where somebody asks for them.
        raw: Nothing tells prompt from answer, so that the row can be split.
        hidden: Whether any token was left out as reasoning.
        notes: Of `notes`.
        example: Where the first of them comes from, for the warning.
    """

    input_ids: list[int]
    completion_mask: list[int]
    trained: list[int]
    text: str = ""
    offsets: Offsets | None = None
    raw: bool = False
    hidden: bool = False
    notes: int = 0
    example: str = ""


def runs(mask: list[int]) -> list[range]:
    """The longest ranges of places whose mask is 1, in order."""
    borders = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    return [range(*pair) for pair in zip(borders[::2], borders[1::2], strict=True)]


def from_tokens(row: dict[str, Any], completion_only_loss: bool, vocabulary: int, place: str) -> Encoded:
    """A row that is tokenised already; its masks are what TRL makes of the same columns.

    Raises:
        ValueError: A column has the wrong type, length or values; names it.
    """
    ids, mask, labels = row["input_ids"], row.get("completion_mask"), row.get("labels")
    for column in ("input_ids", "completion_mask", "labels", "attention_mask"):
        values = row.get(column, ids)
        if not isinstance(values, list) or len(values) != len(ids) or not all(isinstance(x, int) for x in values):
            length = f"{len(values)} for {len(ids)} tokens, " if isinstance(values, list) else ""
            raise ValueError(
                f"{place}: `{column}` must be a list of integers, one per token, is {length}{describe(values)}"
            )
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(
            f"{place}: `input_ids` has {wrong[0]}, but the tokenizer's ids are 0 to {vocabulary - 1}: tokenise the "
            "data with the tokenizer of this model"
        )
    if 0 in row.get("attention_mask", ()):
        raise ValueError(f"{place}: `attention_mask` has zeros: give rows without padding, it is added per batch")
    trained = [1] * len(ids)
    if labels is not None:
        if any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
            raise ValueError(f"{place}: a label is neither -100 nor the token at its place: do not shift `labels`")
        trained = [int(label != -100) for label in labels]
    elif completion_only_loss and mask is not None:
        trained = mask
    return Encoded(ids, trained if mask is None else mask, trained, raw=mask is None and labels is None)


def describe(value: Any) -> str:
    """Type and, shortened, value for a message."""
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"
