"""What every pocket task consists of, what has to hold for it, and how it is written."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task without its base model.

    Attributes:
        files: Name of each file, without its suffix -> its rows. `pretrain` has rows with `text`.
        splits: Name of each split -> its prompts (or what else no two splits may share).
        about: What task.json says beside sizes and counts.
    """

    files: Mapping[str, list[Row]]
    splits: Mapping[str, Collection[str]]
    about: Mapping[str, Any]


def check_splits(splits: Mapping[str, Collection[str]]) -> None:
    """Refuse splits that share a prompt.

    Raises:
        ValueError: Names the two splits and the first prompt that is in both.
    """
    seen: dict[str, str] = {}
    for name, prompts in splits.items():
        for prompt in prompts:
            other = seen.setdefault(prompt, name)
            if other != name:
                raise ValueError(
                    f"splits: {other} and {name} share the prompt {prompt!r:.200}: remove it from one of the two"
                )


def check_boundary(name: str, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows whose prompt, tokenised alone, does not begin the tokenised prompt and completion.

    Raises:
        ValueError: Names the file, the line and the prompt.
    """
    for line, row in enumerate(rows, 1):
        prompt, whole = tokenizer([row["prompt"], row["prompt"] + row["completion"]])["input_ids"]
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"{name}.jsonl, line {line}: the prompt {row['prompt']!r:.200} does not end on a token boundary: let "
                "the completion begin with a space or the prompt end with a line break"
            )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines; characters beyond ASCII stay readable."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_about(folder: Path, task: Task, about: Mapping[str, Any]) -> None:
    """task.json: what was made, how much of it, and how long it took."""
    counts = {f"{name}.jsonl": len(rows) for name, rows in task.files.items()}
    text = json.dumps({**task.about, **about, "rows": counts}, indent=2, ensure_ascii=False)
    (folder / "task.json").write_text(text + "\n", encoding="utf-8")
