"""The base model of a pocket task: a small Qwen2, trained from scratch on the text of `pretrain`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..scratch.training import SFT, new_model, train


@dataclass(frozen=True)
class BaseSizes:
    """How large the base model is, and how it is trained: one epoch, cosine schedule."""

    vocab_size: int = 1024
    hidden_size: int = 192
    layers: int = 4
    batch_size: int = 16
    learning_rate: float = 3e-3


SMOKE_BASE = BaseSizes(vocab_size=384, hidden_size=64, layers=2)


def train_base(
    folder: Path, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sizes: BaseSizes, seed: int
) -> float:
    """Train a model on every token of the texts; saved with its tokenizer in `folder/base`, and in `folder/untrained`.

    The untrained one is a feature network that has learned nothing, for comparison.

    Returns:
        Seconds of training.
    """
    encoded: Any = tokenizer(list(texts))["input_ids"]
    documents = Dataset.from_dict({"input_ids": [[*tokens, tokenizer.eos_token_id] for tokens in encoded]})
    model = new_model(tokenizer, sizes.hidden_size, sizes.layers, seed)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "untrained")
    settings: dict[str, Any] = {
        "per_device_train_batch_size": sizes.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "cosine",
        "seed": seed,
    }
    return train(model, tokenizer, documents, folder / "base", SFT, **settings)
