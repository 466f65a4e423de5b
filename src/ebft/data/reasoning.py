"""Reasoning between two tags, which stays as context: found in the text of an answer, taken out of its masks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ebft.data.encoded import Encoded, runs
from ebft.data.notes import NO_ANSWER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tags(tags: Sequence[str] | None) -> None:
    """Refuse what is neither nothing nor an opening and a closing tag that can be told apart.

    Raises:
        ValueError: Names `reasoning_tags`, what was given, and what to give.
    """
    wanted = "give the opening and the closing tag, such as <think> </think>"
    if not tags:
        return
    if isinstance(tags, str) or len(tags) != 2:
        raise ValueError(f"reasoning_tags={tags!r} must be two strings: {wanted}.")
    if not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise ValueError(f"reasoning_tags={list(tags)!r}: one of them is no string, or blank: {wanted}.")
    if tags[0] in tags[1] or tags[1] in tags[0]:
        raise ValueError(f"reasoning_tags={list(tags)!r}: one is a part of the other, or they are equal: {wanted}.")


def reasoning_spans(text: str, begin: int, end: int, tags: Sequence[str]) -> list[tuple[int, int]]:
    """Where the reasoning of the answer `text[begin:end]` is, tags included: pairs of characters' places.

    Reasoning that is never closed reaches to the answer's end. An answer whose closing tag comes first began inside:
    the chat template's generation prompt opened it.
    """
    opening, closing = tags
    spans, at = [], begin
    first, closed = text.find(opening, begin, end), text.find(closing, begin, end)
    if closed >= 0 and not 0 <= first < closed:
        at = closed + len(closing)
        spans.append((begin, at))
    while (start := text.find(opening, at, end)) >= 0:
        closed = text.find(closing, start + len(opening), end)
        at = end if closed < 0 else closed + len(closing)
        spans.append((start, at))
    return spans


def without_reasoning(encoded: Encoded, tags: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Set both masks to 0 on every token that has a character of the reasoning of an answer.

    An answer of which nothing but white space and special tokens would be left is taken out whole.

    Args:
        encoded: With its text and offsets.
        tags: Opening and closing.
        tokenizer: Of the tokens.
    """
    assert encoded.offsets is not None, "asked for wherever there are tags"
    starts, ends = np.array(encoded.offsets, dtype=int).reshape(-1, 2).T
    hidden, notes = np.zeros(len(starts), dtype=bool), encoded.notes
    for run in runs(encoded.completion_mask):
        places = np.array(run)
        written = places[ends[places] > starts[places]]  # a tokenizer's own EOS stands for no character
        if not len(written):
            continue
        spans = reasoning_spans(encoded.text, starts[written].min(), ends[written].max(), tags)
        for begin, end in spans:
            within = written[(starts[written] < end) & (ends[written] > begin)]
            if len(within):
                hidden[within.min() : within.max() + 1] = True
        left = [encoded.input_ids[i] for i in run if not hidden[i]]
        if spans and not str(tokenizer.decode(left, skip_special_tokens=True)).strip():
            hidden[places] = True
            notes |= NO_ANSWER
    if not hidden.any():
        return encoded
    completion_mask, trained = (
        np.where(hidden, 0, mask).tolist() for mask in (encoded.completion_mask, encoded.trained)
    )
    return replace(encoded, completion_mask=completion_mask, trained=trained, hidden=True, notes=notes)
