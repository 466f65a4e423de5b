"""Rows of TRL's dataset formats -> documents with masks, token for token as `trl.SFTTrainer` makes them.

Where the two differ on purpose: raw text longer than `max_length` is split, not cut; documents without a token to
train on are dropped here, not carried along; a conversation whose chat template renders earlier turns otherwise when
more follow becomes one document per assistant turn (`split_turns`); and TRL's training version of a template that
marks nothing itself is used also without `assistant_only_loss`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebft.data.conversations import ConversationEncoder, behind_prompt, conversation_encoder
from ebft.data.encoded import Encoded, describe, from_tokens
from ebft.data.formats import Format, are_messages, column_names, detect_format, first_row
from ebft.data.notes import (
    CUT,
    DROPPED,
    NO_ANSWER,
    REASONED,
    SHIFTED,
    SHORT,
    SPLIT,
    document_features,
    number,
    number_stream,
)
from ebft.data.reasoning import check_tags, without_reasoning

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

# A row may be a book, which takes a hundred times its bytes while it is tokens in Python; `datasets` would take 1,000.
ROWS_AT_A_TIME = 16


def tokenize_documents(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    split_turns: bool | None = None,
    reasoning_tags: Sequence[str] | None = None,
    needs_turns: bool = False,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    num_proc: int | None = None,
    dataset_label: str = "train_dataset",
    with_rows: bool = False,
) -> "Dataset | IterableDataset":
    """Tokenise a dataset in any of TRL's formats into documents of at most `max_length` tokens.

    EOS is appended to text and string completions that do not end with it, and trained on. Raw text longer than
    `max_length` is split into consecutive documents; prompt-completion rows, conversations and tokenised rows with a
    mask are cut at the end. What was split, cut and dropped is counted and warned of.

    Args:
        dataset: Rows with `text`; `messages`; `prompt` and `completion` (strings or messages); or `input_ids` with an
            optional `completion_mask` or `labels`. Lazy where it is an `IterableDataset`: errors and warnings, these
            without counts, then come with the rows.
        tokenizer: Needs an EOS token, and a chat template for messages.
        max_length: P, longest document in tokens.
        completion_only_loss: Train on completions only; None = where there are `prompt` and `completion`.
        assistant_only_loss: Train on assistant turns only; needs messages.
        split_turns: Make each assistant turn a document of its own behind its own history, trained on alone; None =
            only of conversations in which that history is not what the whole conversation has in its place.
        reasoning_tags: Opening and closing tag of what is context alone in an answer: not of `completion_mask`, not
            trained on. Looked for in raw text, completions and assistant turns.
        needs_turns: Refuse conversations in which no assistant turn can be told apart.
        formatting_func: Makes the text of a row; the rows are then raw text.
        num_proc: Worker processes, for a `Dataset`.
        dataset_label: What messages call the dataset.
        with_rows: Keep the index of each document's row in the dataset, as `row`; not of a stream.

    Returns:
        One row per document: `input_ids`; `completion_mask`, 1 = token of an answer (all 1 for raw text and for
        conversations whose template marks nothing); `loss_mask`, 1 = trained on, 0 for the first token; `document_id`,
        the index of the row here (in a stream that is read by several workers: within a worker's share).

    Raises:
        ValueError: if no format's columns are there, the dataset is empty, a row has the wrong type (names it), or the
            options do not fit the dataset or the tokenizer.
    """
    from datasets import Dataset

    check_tags(reasoning_tags)
    tags = tuple(reasoning_tags or ())
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a document needs at least 2 tokens, one to predict the other from")
    format, formatting_func = _check_format(dataset, tokenizer, formatting_func, completion_only_loss, dataset_label)
    if completion_only_loss is None:
        completion_only_loss = format == "prompt_completion"
    conversations = None
    if _is_conversation(dataset, format, dataset_label):
        conversations = conversation_encoder(
            tokenizer,
            label=dataset_label,
            split_turns=split_turns,
            completion_only_loss=completion_only_loss and format == "prompt_completion",
            assistant_only_loss=assistant_only_loss,
            needs_turns=needs_turns or bool(tags),
            prompts=format == "prompt_completion",
        )
    elif assistant_only_loss or split_turns:
        name = "assistant_only_loss" if assistant_only_loss else "split_turns"
        raise ValueError(
            f"{name}=True, but {dataset_label} holds no messages (format: {format}): set it to False, or give "
            "`messages`, or `prompt` and `completion` as lists of messages"
        )
    _check_reasoning(tags, format, tokenizer, dataset_label)
    encode = _Encoder(
        tokenizer,
        format,
        max_length,
        completion_only_loss,
        conversations,
        tags,
        formatting_func,
        dataset_label,
    )
    options: dict[str, Any] = {"batched": True, "batch_size": ROWS_AT_A_TIME, "with_indices": True}
    options["features"] = document_features()
    options["remove_columns"] = column_names(dataset)
    if not isinstance(dataset, Dataset):
        return number_stream(dataset.map(encode, **options), max_length, dataset_label)
    if dataset.format["type"] == "custom":
        raise ValueError(f"{dataset_label} has a transform (with_transform), which may be random: use map instead")
    # A format ("torch", "numpy") would turn the rows' lists into tensors.
    documents = dataset.with_format(None).map(encode, **options, num_proc=num_proc, desc=f"Tokenizing {dataset_label}")
    return number(documents if with_rows else documents.remove_columns("row"), max_length, dataset_label)


def _check_format(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    formatting_func: Callable[[dict[str, Any]], str] | None,
    completion_only_loss: bool | None,
    label: str,
) -> tuple[Format, Callable[[dict[str, Any]], str] | None]:
    """The format, and the formatting_func if it is used; before any row is tokenised."""
    if tokenizer.eos_token is None:
        raise ValueError(
            "processing_class.eos_token is None, but EOS ends every document: set processing_class.eos_token (or "
            "eos_token in the config) to a token of its vocabulary"
        )
    if formatting_func is None:
        return detect_format(dataset, label), None
    if "input_ids" in first_row(dataset, label):
        warnings.warn(f"{label} is tokenised already: formatting_func is ignored", stacklevel=3)
        return "tokenized", None
    if completion_only_loss:
        raise ValueError(
            "completion_only_loss=True does not go with a formatting_func, whose text has no completion: map the "
            "dataset to `prompt` and `completion` instead"
        )
    return "text", formatting_func


def _is_conversation(dataset: "Dataset | IterableDataset", format: Format, label: str) -> bool:
    row = first_row(dataset, label)
    return format == "messages" or (format == "prompt_completion" and isinstance(row["prompt"], list))


def _check_reasoning(tags: Sequence[str], format: Format, tokenizer: "PreTrainedTokenizerBase", label: str) -> None:
    """Refuse tags where nothing says which characters a token stands for."""
    if tags and format == "tokenized":
        raise ValueError(
            f"reasoning_tags={list(tags)}, but {label} holds tokens, in which they are not looked for: leave the "
            "reasoning out of `completion_mask` and `labels`, and the option too"
        )
    if tags and not tokenizer.is_fast:
        raise ValueError(
            f"reasoning_tags={list(tags)}: processing_class is a slow tokenizer ({type(tokenizer).__name__}), which "
            "does not say where its tokens stand in the text: use the fast one of this model"
        )


@dataclass(frozen=True)
class _Encoder:
    """Makes documents of a batch of rows; a plain object, so that `datasets` can hash it and send it to workers."""

    tokenizer: "PreTrainedTokenizerBase"
    format: Format
    max_length: int
    completion_only_loss: bool
    conversations: ConversationEncoder | None
    reasoning_tags: tuple[str, ...]
    formatting_func: Callable[[dict[str, Any]], str] | None
    label: str

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """Documents of `batch`, whose rows have the given indices in the dataset."""
        columns = ("input_ids", "completion_mask", "loss_mask", "notes", "example", "row")
        documents: dict[str, list] = {name: [] for name in columns}
        rows = ({column: batch[column][i] for column in batch} for i in range(len(indices)))
        for index, row in zip(indices, rows, strict=True):
            for encoded in self._encode(row, f"{self.label}, row {index}"):
                if self.reasoning_tags:
                    encoded = without_reasoning(encoded, self.reasoning_tags, self.tokenizer)
                for document in self._documents(encoded):
                    for column, value in zip(documents.values(), (*document, encoded.example, index), strict=True):
                        column.append(value)
        return documents

    def _documents(self, encoded: Encoded) -> list[tuple[list[int], list[int], list[int], int]]:
        """`(input_ids, completion_mask, loss_mask, notes)` of each document, cut to length."""
        ids, limit = encoded.input_ids, self.max_length
        starts = list(range(0, max(len(ids), 1), limit)) if encoded.raw else [0]
        if len(starts) > 1 and len(ids) % limit == 1:
            starts[-1] -= 1  # a last token alone, EOS, is predicted from the one before it, which is not trained again
        documents = []
        for start in starts:
            piece = slice(start, start + limit)
            loss_mask = [0, *encoded.trained[piece][1:]]
            notes = encoded.notes
            if not any(loss_mask):
                why = REASONED if encoded.hidden else SHORT if encoded.raw else DROPPED
                notes = notes & ~NO_ANSWER | why
            elif start == 0 and len(ids) > limit:
                notes |= SPLIT if encoded.raw else CUT
            documents.append((ids[piece], encoded.completion_mask[piece], loss_mask, notes))
        return documents

    def _encode(self, row: dict[str, Any], place: str) -> list[Encoded]:
        if self.format == "tokenized":
            return [from_tokens(row, self.completion_only_loss, len(self.tokenizer), place)]
        if self.format == "prompt_completion":
            return self._prompt_completion(row, place)
        if self.format == "messages":
            return self._messages(row, place)
        text = row["text"] if self.formatting_func is None else self.formatting_func(row)
        if not isinstance(text, str):
            source = "`text`" if self.formatting_func is None else "the text of formatting_func"
            raise ValueError(f"{place}: {source} is {describe(text)}: make it a string, or remove the row")
        encoded = self._of_text(self._with_eos(text))
        encoded.raw = True
        return [encoded]

    def _of_text(self, text: str) -> Encoded:
        # Not verbose: what is longer than the model's own limit is split or cut later, and said so.
        found = self.tokenizer(text=text, verbose=False, return_offsets_mapping=bool(self.reasoning_tags))
        ids: Any = found["input_ids"]
        return Encoded(list(ids), [1] * len(ids), [1] * len(ids), text, found.get("offset_mapping"))

    def _with_eos(self, text: str) -> str:
        eos = str(self.tokenizer.eos_token)
        return text if text.endswith(eos) else text + eos

    def _prompt_completion(self, row: dict[str, Any], place: str) -> list[Encoded]:
        prompt, completion = row["prompt"], row["completion"]
        if self.conversations is not None and are_messages(prompt) and are_messages(completion):
            return self.conversations.documents(prompt + completion, row, place, first=len(prompt))
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise ValueError(
                f"{place}: `prompt` is {describe(prompt)} and `completion` {describe(completion)}: make both "
                "strings or both lists of messages, or remove the row"
            )
        encoded = self._of_text(prompt + self._with_eos(completion))
        encoded.completion_mask, shifted = behind_prompt(self._of_text(prompt).input_ids, encoded.input_ids)
        if self.completion_only_loss:
            encoded.trained = encoded.completion_mask
        encoded.notes = SHIFTED * shifted
        return [encoded]

    def _messages(self, row: dict[str, Any], place: str) -> list[Encoded]:
        assert self.conversations is not None, "made for this format"
        messages = row["messages"] if "messages" in row else row["conversations"]
        if not are_messages(messages):
            raise ValueError(
                f"{place}: `messages` is {describe(messages)}: make it a list of messages with `role` and `content`, "
                "or remove the row"
            )
        return self.conversations.documents(messages, row, place)
