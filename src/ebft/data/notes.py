"""What happened to documents on the way from their rows: noted per document, counted, and warned of.

A note is a bit of a document's column `notes`: worker processes and cached results can carry a column, but no counter.
"""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPLIT, CUT, DROPPED, SHIFTED, SHORT, REASONED, NO_ANSWER, OTHER_HISTORY, OWN_HISTORY = (1 << bit for bit in range(9))
_TEXTS = {
    SPLIT: "{count} document(s) longer than max_length={max_length} split into several documents",
    CUT: "{count} document(s) longer than max_length={max_length} cut at the end: raise max_length to train on all of "
    "them",
    DROPPED: "{count} document(s) without a token to train on dropped: the prompt alone fills "
    "max_length={max_length}, or there are fewer than two tokens",
    SHORT: "{count} document(s) of fewer than two tokens dropped: there is nothing to predict",
    SHIFTED: "{count} document(s) whose tokenised prompt does not begin the tokenised prompt + completion: there the "
    "completion starts where the two part, in a context that does not occur at inference. End prompts on a token "
    "boundary, or use a chat template that renders the prompt the same way in both cases",
    REASONED: "{count} document(s) dropped in which reasoning_tags leave no token to train on: the answer is "
    "reasoning alone, or comes behind max_length={max_length}",
    NO_ANSWER: "{count} document(s) with an answer that is reasoning alone: it stays as context and is not trained on",
    OTHER_HISTORY: "{count} conversation(s) hold a turn or a history that the model does not write or see at "
    "inference, since the chat template renders earlier turns otherwise when more follow: with split_turns: true each "
    "turn is trained on behind its own history",
    OWN_HISTORY: "{count} conversation(s) became one document per assistant turn, each behind its own history, since "
    "the chat template renders earlier turns otherwise when more follow (split_turns: false keeps them whole)",
}
_UNUSABLE = DROPPED | SHORT | REASONED


def document_features() -> Any:
    """Columns of the documents; also what keeps masks at a byte per token on disk."""
    from datasets import Features, List, Value

    mask = List(Value("int8"))
    columns = {"input_ids": List(Value("int32")), "completion_mask": mask, "loss_mask": mask}
    return Features(columns | {"notes": Value("int16"), "example": Value("string"), "row": Value("int64")})


def number(documents: "Dataset", max_length: int, label: str) -> "Dataset":
    """Warn of what the notes say, drop what cannot be trained on, and give the rest their ids.

    Raises:
        ValueError: if nothing is left.
    """
    notes = documents.data.column("notes").to_numpy()
    examples = documents.data.column("example")
    for bit in _TEXTS:
        found = np.flatnonzero(notes & bit)
        if len(found):
            _warn(label, bit, len(found), max_length, examples[int(found[0])].as_py())
    documents = documents.remove_columns(["notes", "example"])
    kept = np.flatnonzero((notes & _UNUSABLE) == 0)
    if len(kept) == 0:
        raise ValueError(
            f"{label}: none of the {len(notes)} documents has a token to train on: raise max_length={max_length} "
            "above the length of the prompts, or check the masks"
        )
    if len(kept) < len(documents):
        documents = documents.select(kept)
    return documents.add_column("document_id", np.arange(len(kept)))


def number_stream(documents: "IterableDataset", max_length: int, label: str) -> "IterableDataset":
    """The same for a stream, where each warning comes with the first row it is about, and nothing can be counted."""
    documents = documents.filter(_Usable(max_length, label), input_columns=["notes", "example"])
    return documents.map(_index, with_indices=True, remove_columns=["notes", "example", "row"])


class _Usable:
    """Whether a document can be trained on; warns of each kind of note once."""

    def __init__(self, max_length: int, label: str):
        self.max_length, self.label, self.told = max_length, label, 0

    def __call__(self, notes: int, example: str) -> bool:
        for bit in _TEXTS:
            if notes & bit & ~self.told:
                _warn(self.label, bit, "some", self.max_length, example)
        self.told |= notes
        return not notes & _UNUSABLE


def _warn(label: str, bit: int, count: int | str, max_length: int, example: str) -> None:
    text = f"{label}: {_TEXTS[bit].format(count=count, max_length=max_length)}"
    if bit & (OTHER_HISTORY | OWN_HISTORY):
        text += f". First: {example}"
    warnings.warn(text, stacklevel=4)


def _index(_: dict[str, Any], index: int) -> dict[str, int]:
    return {"document_id": index}
