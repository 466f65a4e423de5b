"""Real text that is on every machine: the source code of Python's standard library, split by file."""

import os
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

# Tests, generated tables, vendored wheels, and what pip has put beside the library.
SKIPPED = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
}


def source_files(folder: str | Path | None = None) -> list[Path]:
    """The library's own modules, in the same order on every machine.

    Args:
        folder: Where to look; by default this Python's standard library.

    Raises:
        ValueError: There are too few: the standard library is in a zip file or stripped of its source.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    files = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith("config-")]
        files += [Path(here, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    if len(files) < 100:
        raise ValueError(
            f"{folder} holds only {len(files)} source files: use a Python with its library's source code."
        )
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def hold_out(files: list[Path], count: int) -> tuple[list[Path], list[Path]]:
    """`(training files, held-out files)`: `count` files at random, the same ones whatever the seed of the run."""
    shuffled = random.Random(0).sample(files, len(files))
    return shuffled[count:], shuffled[:count]


def read(file: Path) -> str:
    """A file's text; bytes that are not UTF-8 are left out."""
    return file.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, of the class that `AutoTokenizer` will load it as beside a Qwen2 model."""
    empty = Qwen2Tokenizer(eos_token="<|endoftext|>", pad_token="<|pad|>")
    return empty.train_new_from_iterator(texts, vocab_size, show_progress=False)


def training_documents(files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Dataset:
    """All files, cut into documents of `length` tokens and shuffled; EOS stands at the end of each file."""
    pieces = [piece for file in files for piece in cut(file, tokenizer, length) if len(piece) > 1]
    random.Random(seed).shuffle(pieces)
    return Dataset.from_dict({"input_ids": pieces})


def held_out_documents(files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """One whole document of each file that has one, so that no two are of the same file."""
    rng = random.Random(0)
    whole = [[piece for piece in cut(file, tokenizer, length) if len(piece) == length] for file in files]
    return Dataset.from_dict({"input_ids": [rng.choice(pieces) for pieces in whole if pieces]})


def cut(file: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """One file's tokens and EOS, `length` at a time."""
    tokens = [*tokenizer(read(file))["input_ids"], tokenizer.eos_token_id]
    return [tokens[i : i + length] for i in range(0, len(tokens), length)]
