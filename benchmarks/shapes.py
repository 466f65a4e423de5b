"""What is measured: shapes of models (random weights, nothing is downloaded) and sizes of an update.

Shape letters: P document tokens, K blocks, N rollouts, G generated tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ebft.blocks import BlockLayout
from ebft.planning import Work

# hidden size, inner size, layers, heads, key heads, vocabulary, tied; from the models' own config.json.
_SIZES = {
    "tiny": ("qwen2", 256, 1024, 4, 4, 2, 8192, True),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.1-70B": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
MODELS = tuple(_SIZES)

# The paper's two settings (method: arXiv 2603.12248, Q&A coding and translation).
SETTINGS: dict[str, dict[str, Any]] = {
    "qa": dict(context_length=8, stride=8, completion_length=8, num_generations=4, pooling="last_token"),
    "translation": dict(context_length=4, stride=2, completion_length=4, num_generations=4, pooling="mean_pooling"),
}


@dataclass(frozen=True)
class Workload:
    """One update: its documents and their blocks.

    Attributes:
        max_length: P, tokens of every document.
        context_length: Shortest prefix of a block, in tokens.
        stride: Tokens between neighbouring blocks.
        completion_length: G.
        num_generations: N.
        pooling: Of the features, `last_token` or `mean_pooling`.
        batch: Documents of an update.
        micro_batch: Documents at a time.
        generation_batch: Documents that ours samples at a time; at least a micro-batch.
        temperature: Of the rollouts.

    Raises:
        ValueError: A size is out of range.
    """

    max_length: int = 1024
    context_length: int = 8
    stride: int = 8
    completion_length: int = 8
    num_generations: int = 4
    pooling: str = "last_token"
    batch: int = 4
    micro_batch: int = 1
    generation_batch: int = 1
    temperature: float = 0.6

    def __post_init__(self):
        for name in (
            "max_length",
            "context_length",
            "stride",
            "completion_length",
            "batch",
            "micro_batch",
            "generation_batch",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations}: rewards compare rollouts, use 2 or more.")
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch={self.batch} is not a multiple of micro_batch={self.micro_batch}: choose a divisor."
            )
        shortest = self.context_length + self.completion_length
        if self.max_length < shortest:
            raise ValueError(
                f"max_length={self.max_length} is too short for one block: use at least context_length + "
                f"completion_length = {shortest}."
            )

    def layout(self) -> BlockLayout:
        """Where the blocks of every document lie."""
        return BlockLayout(self.max_length, self.stride, self.context_length, self.completion_length)

    def work(self) -> Work:
        """One document, as `ebft.planning` counts it."""
        P, layout = self.max_length, self.layout()
        return Work(P, layout.num_blocks, float(layout.anchors.sum()), P * (P + 1) / 2)


def model_config(name: str, longest: int, vocab: int | None = None) -> PretrainedConfig:
    """Configuration of a named shape.

    Args:
        name: One of `MODELS`.
        longest: Positions it must know.
        vocab: Another size of the vocabulary.
    """
    family, hidden, inner, layers, heads, keys, vocabulary, tied = _SIZES[name]
    return AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocab or vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=longest,
    )


def build_model(
    name: str, *, vocab: int | None, device: torch.device, dtype: torch.dtype, attention: str, longest: int
) -> nn.Module:
    """A causal LM of a named shape with random weights, made on its device.

    Args:
        name: One of `MODELS`.
        vocab: Another size of the vocabulary.
        device: Where.
        dtype: Of the weights.
        attention: `attn_implementation`.
        longest: Positions it must know.
    """
    config = model_config(name, longest, vocab)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
