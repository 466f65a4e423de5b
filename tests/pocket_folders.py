"""Smoke runs of the pocket tasks, and what is asked of each alike."""

import json
from pathlib import Path
from typing import Any

from ebft.pocket.__main__ import argument_parser, make, run
from ebft.pocket.base import SMOKE_BASE


def smoke(task: str, folder: Path, *options: str) -> Path:
    """A finished smoke run, in this process: without what the command does to its logging and threads."""
    chosen = argument_parser().parse_args([task, "--smoke", *options])
    folder.mkdir()
    made, sizes = make(chosen)
    run(folder, made, SMOKE_BASE, {"seed": chosen.seed, "smoke": True, "sizes": sizes})
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def prompts_of_splits(folder: Path) -> dict[str, set[str]]:
    """Prompts as they stand in the files; of rows of text, the whole text."""
    found: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        split = file.stem.removesuffix("_problems").removesuffix("_segments").removesuffix("_functions")
        split = "train" if split == "train_small" else split
        found.setdefault(split, set()).update(
            row.get("prompt") or row.get("text") or row["source"] for row in rows(folder, file.stem)
        )
    return found


def shared(prompts: dict[str, set[str]]) -> list[tuple[str, str, str]]:
    """`(split, other split, prompt)` where the other split's texts begin with the prompt: pretrain has whole texts."""
    return [
        (a, b, prompt)
        for a in prompts
        for b in prompts
        if a != b
        for prompt in prompts[a]
        if any(text.startswith(prompt) for text in prompts[b])
    ]
