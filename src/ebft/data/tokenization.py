"""Rows of TRL's dataset formats -> documents with masks, token for token as `trl.SFTTrainer` makes them.

Where the two differ on purpose: raw text longer than `max_length` is split, not cut, and documents without a token to
train on are dropped here, not carried along.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ebft.data.formats import Format, are_messages, as_chatml, column_names, detect_format, first_row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

# What happened to a document, as bits of its `notes`: worker processes and cached results can carry a column, but no
# counter. The texts are completed with the number of documents.
_SPLIT, _CUT, _DROPPED, _SHIFTED, _SHORT = 1, 2, 4, 8, 16
_NOTES = {
    _SPLIT: "longer than max_length={max_length} split into several documents",
    _CUT: "longer than max_length={max_length} cut at the end: raise max_length to train on all of them",
    _DROPPED: "without a token to train on dropped: the prompt alone fills max_length={max_length}, or there are "
    "fewer than two tokens",
    _SHORT: "of fewer than two tokens dropped: there is nothing to predict",
    _SHIFTED: "whose tokenised prompt does not begin the tokenised prompt + completion: there the completion starts "
    "where the two part, in a context that does not occur at inference. End prompts on a token boundary, or use a "
    "chat template that renders the prompt the same way in both cases",
}


def tokenize_documents(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
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
        formatting_func: Makes the text of a row; the rows are then raw text.
        num_proc: Worker processes, for a `Dataset`.
        dataset_label: What messages call the dataset.
        with_rows: Keep the index of each document's row in the dataset, as `row`; not of a stream.

    Returns:
        One row per document: `input_ids`; `completion_mask`, 1 = answer token (all 1 for raw text and for unmarked
        conversations); `loss_mask`, 1 = trained on, 0 for the first token; `document_id`, the index of the row here
        (in a stream that is read by several workers: within a worker's share).

    Raises:
        ValueError: if no format's columns are there, the dataset is empty, a row has the wrong type (names it), or the
            options do not fit the dataset or the tokenizer.
    """
    from datasets import Dataset

    encode = _encoder(
        dataset, tokenizer, max_length, completion_only_loss, assistant_only_loss, formatting_func, dataset_label
    )
    options: dict[str, Any] = {"batched": True, "with_indices": True, "features": _document_features()}
    options["remove_columns"] = column_names(dataset)
    if not isinstance(dataset, Dataset):
        return _number_stream(dataset.map(encode, **options), max_length, dataset_label)
    if dataset.format["type"] == "custom":
        raise ValueError(f"{dataset_label} has a transform (with_transform), which may be random: use map instead")
    # A format ("torch", "numpy") would turn the rows' lists into tensors.
    documents = dataset.with_format(None).map(encode, **options, num_proc=num_proc, desc=f"Tokenizing {dataset_label}")
    return _number(documents if with_rows else documents.remove_columns("row"), max_length, dataset_label)


def _encoder(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    completion_only_loss: bool | None,
    assistant_only_loss: bool,
    formatting_func: Callable[[dict[str, Any]], str] | None,
    label: str,
) -> "_Encoder":
    """Check that the options fit each other, the dataset and the tokenizer, before any row is tokenised."""
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a document needs at least 2 tokens, one to predict the other from")
    if tokenizer.eos_token is None:
        raise ValueError(
            "processing_class.eos_token is None, but EOS ends every document: set processing_class.eos_token (or "
            "eos_token in the config) to a token of its vocabulary"
        )
    row = first_row(dataset, label)
    if formatting_func is not None and "input_ids" in row:
        warnings.warn(f"{label} is tokenised already: formatting_func is ignored", stacklevel=3)
        formatting_func = None
    if formatting_func is not None and completion_only_loss:
        raise ValueError(
            "completion_only_loss=True does not go with a formatting_func, whose text has no completion: map the "
            "dataset to `prompt` and `completion` instead"
        )
    format: Format = "text" if formatting_func is not None else detect_format(dataset, label)
    chat_template = None
    if _is_conversation(row, format):
        chat_template = _chat_template(tokenizer, assistant_only_loss, label)
    elif assistant_only_loss:
        raise ValueError(
            f"assistant_only_loss=True, but {label} holds no messages (format: {format}): set it to False, or give "
            "`messages`, or `prompt` and `completion` as lists of messages"
        )
    if completion_only_loss is None:
        completion_only_loss = format == "prompt_completion"
    return _Encoder(
        tokenizer, format, max_length, completion_only_loss, assistant_only_loss, chat_template, formatting_func, label
    )


def _is_conversation(row: dict[str, Any], format: Format) -> bool:
    return format == "messages" or (format == "prompt_completion" and isinstance(row["prompt"], list))


def _chat_template(tokenizer: "PreTrainedTokenizerBase", assistant_only_loss: bool, label: str) -> str | None:
    """The template to use in place of the tokenizer's own, if that does not mark the assistant's turns but must."""
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    if tokenizer.chat_template is None:
        raise ValueError(
            f"processing_class.chat_template is None, but {label} holds messages: use a model with a chat "
            "template, set processing_class.chat_template in Python, or give `prompt` and `completion` as strings"
        )
    if not assistant_only_loss:
        return None
    template = None
    if not has_generation_markers(tokenizer.chat_template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "assistant_only_loss=True, but processing_class.chat_template does not mark the assistant's tokens: "
                "put {% generation %} and {% endgeneration %} around them, end-of-turn token included, or set "
                "assistant_only_loss=False"
            ) from error
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        warnings.warn(
            "the chat template leaves the assistant's end-of-turn token outside of its {% generation %} markers: with "
            "assistant_only_loss the model does not learn to stop. Move {% endgeneration %} behind that token",
            stacklevel=4,
        )
    return template


@dataclass(frozen=True)
class _Encoder:
    """Makes documents of a batch of rows; a plain object, so that `datasets` can hash it and send it to workers."""

    tokenizer: "PreTrainedTokenizerBase"
    format: Format
    max_length: int
    completion_only_loss: bool
    assistant_only_loss: bool
    chat_template: str | None
    formatting_func: Callable[[dict[str, Any]], str] | None
    label: str

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """Documents of `batch`, whose rows have the given indices in the dataset."""
        documents: dict[str, list] = {"input_ids": [], "completion_mask": [], "loss_mask": [], "notes": [], "row": []}
        rows = ({column: batch[column][i] for column in batch} for i in range(len(indices)))
        for index, row in zip(indices, rows, strict=True):
            for document in self._documents(row, index):
                for column, value in zip(documents.values(), (*document, index), strict=True):
                    column.append(value)
        return documents

    def _documents(self, row: dict[str, Any], index: int) -> list[tuple[list[int], list[int], list[int], int]]:
        """`(input_ids, completion_mask, loss_mask, notes)` of each document of a row."""
        encoded = self._encode(row, f"{self.label}, row {index}")
        ids, completion_mask, trained = encoded.input_ids, encoded.completion_mask, encoded.trained
        limit = self.max_length
        starts = list(range(0, max(len(ids), 1), limit)) if encoded.raw else [0]
        if len(starts) > 1 and len(ids) % limit == 1:
            starts[-1] -= 1  # a last token alone, EOS, is predicted from the one before it, which is not trained again
        documents = []
        for start in starts:
            piece = slice(start, start + limit)
            loss_mask = [0, *trained[piece][1:]]
            notes = _SHIFTED * encoded.shifted
            if not any(loss_mask):
                notes |= _SHORT if encoded.raw else _DROPPED
            elif start == 0 and len(ids) > limit:
                notes |= _SPLIT if encoded.raw else _CUT
            documents.append((ids[piece], completion_mask[piece], loss_mask, notes))
        return documents

    def _encode(self, row: dict[str, Any], place: str) -> "_Encoded":
        if self.format == "tokenized":
            return _from_tokens(row, self.completion_only_loss, len(self.tokenizer), place)
        if self.format == "prompt_completion":
            return self._prompt_completion(row, place)
        if self.format == "messages":
            return self._messages(row, place)
        text = row["text"] if self.formatting_func is None else self.formatting_func(row)
        if not isinstance(text, str):
            source = "`text`" if self.formatting_func is None else "the text of formatting_func"
            raise ValueError(f"{place}: {source} is {_describe(text)}: make it a string, or remove the row")
        ids = self._tokens(self._with_eos(text))
        return _Encoded(ids, [1] * len(ids), [1] * len(ids), raw=True)

    def _tokens(self, text: str) -> list[int]:
        # Not verbose: what is longer than the model's own limit is split or cut later, and said so.
        return list(self.tokenizer(text=text, verbose=False)["input_ids"])

    def _with_eos(self, text: str) -> str:
        eos = str(self.tokenizer.eos_token)
        return text if text.endswith(eos) else text + eos

    def _prompt_completion(self, row: dict[str, Any], place: str) -> "_Encoded":
        from trl.data_utils import common_prefix_length

        prompt, completion = row["prompt"], row["completion"]
        assistant = None
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt_ids, ids = self._tokens(prompt), self._tokens(prompt + self._with_eos(completion))
        elif are_messages(prompt) and are_messages(completion):
            prompt_ids, _ = self._render(prompt, row, place, add_generation_prompt=True)
            ids, assistant = self._render(
                prompt + completion, row, place, return_assistant_tokens_mask=self.assistant_only_loss
            )
        else:
            raise ValueError(
                f"{place}: `prompt` is {_describe(prompt)} and `completion` {_describe(completion)}: make both "
                "strings or both lists of messages, or remove the row"
            )
        start = common_prefix_length(prompt_ids, ids)
        completion_mask = [0] * start + [1] * (len(ids) - start)
        trained = completion_mask if self.completion_only_loss else [1] * len(ids)
        if assistant is not None:
            trained = [a & b for a, b in zip(trained, assistant, strict=True)]
        return _Encoded(ids, completion_mask, trained, shifted=start < len(prompt_ids))

    def _messages(self, row: dict[str, Any], place: str) -> "_Encoded":
        messages = row["messages"] if "messages" in row else row["conversations"]
        if not are_messages(messages):
            raise ValueError(
                f"{place}: `messages` is {_describe(messages)}: make it a list of messages with `role` and `content`, "
                "or remove the row"
            )
        ids, assistant = self._render(messages, row, place, return_assistant_tokens_mask=self.assistant_only_loss)
        mask = [1] * len(ids) if assistant is None else assistant
        return _Encoded(ids, mask, mask)

    def _render(
        self, messages: list[dict[str, Any]], row: dict[str, Any], place: str, **options: Any
    ) -> tuple[list[int], list[int] | None]:
        """Token ids of messages and, if asked for, the mask of the assistant's."""
        from jinja2 import TemplateError

        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options |= {"chat_template": self.chat_template, "tools": tools, **(row.get("chat_template_kwargs") or {})}
        options |= {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
        chat = as_chatml(messages)
        for message in chat:
            if message.get("content") is None and not message.get("tool_calls"):
                raise ValueError(f"{place}: a message has no `content`: give it one, or remove the row")
        try:
            rendered: Any = self.tokenizer.apply_chat_template(chat, **options)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{place}: the chat template cannot render these messages ({error}): make each `content` a string and "
                "the roles those that the template knows, in its order, or remove the row"
            ) from error
        assistant = rendered.get("assistant_masks")
        if assistant is not None and 1 not in assistant:
            raise ValueError(
                f"{place}: assistant_only_loss=True, but the chat template marks no assistant token here: remove rows "
                "without an assistant turn, or put {% generation %} markers into the template"
            )
        return rendered["input_ids"], assistant


@dataclass
class _Encoded:
    """Tokens of one row before it is cut to length."""

    input_ids: list[int]
    completion_mask: list[int]
    trained: list[int]
    raw: bool = False  # nothing tells prompt from answer, so that the row can be split
    shifted: bool = False  # the completion does not start where the tokenised prompt ends


def _from_tokens(row: dict[str, Any], completion_only_loss: bool, vocabulary: int, place: str) -> _Encoded:
    """A row that is tokenised already; its masks are what TRL makes of the same columns."""
    ids, mask, labels = row["input_ids"], row.get("completion_mask"), row.get("labels")
    for column in ("input_ids", "completion_mask", "labels", "attention_mask"):
        values = row.get(column, ids)
        if not isinstance(values, list) or len(values) != len(ids) or not all(isinstance(x, int) for x in values):
            length = f"{len(values)} for {len(ids)} tokens, " if isinstance(values, list) else ""
            raise ValueError(
                f"{place}: `{column}` must be a list of integers, one per token, is {length}{_describe(values)}"
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
    return _Encoded(ids, trained if mask is None else mask, trained, raw=mask is None and labels is None)


def _describe(value: Any) -> str:
    """Type and, shortened, value for a message."""
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"


def _document_features() -> Any:
    """Columns of the documents; also what keeps masks at a byte per token on disk."""
    from datasets import Features, List, Value

    mask = List(Value("int8"))
    columns = {"input_ids": List(Value("int32")), "completion_mask": mask, "loss_mask": mask}
    return Features(columns | {"notes": Value("int8"), "row": Value("int64")})


def _number(documents: "Dataset", max_length: int, label: str) -> "Dataset":
    """Warn of what the notes say, drop what cannot be trained on, and give the rest their ids."""
    notes = documents.data.column("notes").to_numpy()
    for bit, text in _NOTES.items():
        if count := np.count_nonzero(notes & bit):
            warnings.warn(f"{label}: {count} document(s) {text.format(max_length=max_length)}", stacklevel=3)
    documents = documents.remove_columns("notes")
    kept = np.flatnonzero((notes & (_DROPPED | _SHORT)) == 0)
    if len(kept) == 0:
        raise ValueError(
            f"{label}: none of the {len(notes)} documents has a token to train on: raise max_length={max_length} "
            "above the length of the prompts, or check the masks"
        )
    if len(kept) < len(documents):
        documents = documents.select(kept)
    return documents.add_column("document_id", np.arange(len(kept)))


def _number_stream(documents: "IterableDataset", max_length: int, label: str) -> "IterableDataset":
    """The same for a stream, where each warning comes with the first row it is about, and nothing can be counted."""
    documents = documents.filter(_keep, input_columns="notes", fn_kwargs={"max_length": max_length, "label": label})
    return documents.map(_index, with_indices=True, remove_columns=["notes", "row"])


def _keep(notes: int, max_length: int, label: str) -> bool:
    for bit, text in _NOTES.items():
        if notes & bit:
            warnings.warn(f"{label}: some document(s) {text.format(max_length=max_length)}", stacklevel=2)
    return not notes & (_DROPPED | _SHORT)


def _index(_: dict[str, Any], index: int) -> dict[str, int]:
    return {"document_id": index}
