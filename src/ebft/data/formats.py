"""Which of TRL's dataset formats a dataset has, read from its columns, and a row's messages."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Format = Literal["text", "messages", "prompt_completion", "tokenized"]

# `conversations` is `messages` under another name (`from` and `value` for `role` and `content`), as in TRL.
FORMAT_COLUMNS = {
    *("text", "messages", "conversations", "prompt", "completion"),
    *("input_ids", "completion_mask", "labels"),
}


def detect_format(dataset: "Dataset | IterableDataset", dataset_label: str = "train_dataset") -> Format:
    """Format of a dataset; where columns of several are present, TRL's order decides.

    Raises:
        ValueError: if no format's columns are there (names those found), or the dataset is no single split.
    """
    columns = set(column_names(dataset, dataset_label))
    if "input_ids" in columns:
        return "tokenized"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if columns & {"messages", "conversations"}:
        return "messages"
    if "text" in columns:
        return "text"
    raise ValueError(
        f"{dataset_label} has the columns {sorted(columns)}, which are no known format: rename or add columns to have "
        "`text`, `messages`, `prompt` and `completion`, or `input_ids`; or pass a formatting_func"
    )


def has_prompt(
    dataset: "Dataset | IterableDataset",
    *,
    reasoning_tags: Sequence[str] | None = None,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
) -> bool:
    """Whether `completion_mask` sets answers apart from prompts: the default anchors are then the completions'.

    True for prompt-completion rows, for conversations, for tokenised rows that bring a `completion_mask` or `labels`,
    and for any text whose reasoning is left out.
    """
    columns = column_names(dataset)
    if "input_ids" in columns:
        return "completion_mask" in columns or "labels" in columns
    if reasoning_tags:
        return True
    return formatting_func is None and detect_format(dataset) in ("prompt_completion", "messages")


def column_names(dataset: "Dataset | IterableDataset", dataset_label: str = "train_dataset") -> list[str]:
    """Columns of a dataset; a stream that does not know them is asked for its first row.

    Raises:
        ValueError: if it is no dataset of a single split, or is an empty stream.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"{dataset_label} is a {type(dataset).__name__}: pass a datasets.Dataset or IterableDataset, for example "
            "dataset['train'] of a DatasetDict, or Dataset.from_list(rows)"
        )
    if dataset.column_names is not None:
        return dataset.column_names
    return list(first_row(dataset, dataset_label))


def first_row(dataset: "Dataset | IterableDataset", dataset_label: str) -> dict[str, Any]:
    """First row of a dataset.

    Raises:
        ValueError: if there is none.
    """
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{dataset_label} is empty: pass at least one row")
    return row


def are_messages(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a conversation: a list of messages, at least one."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and ("role" in message or "from" in message) for message in value)
    )


def as_chatml(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, also where they come with `from` and `value`, as ShareGPT's do."""
    names, roles = {"from": "role", "value": "content"}, {"human": "user", "gpt": "assistant"}
    return [
        {names.get(key, key): roles.get(value, value) if key == "from" else value for key, value in message.items()}
        for message in messages
    ]
