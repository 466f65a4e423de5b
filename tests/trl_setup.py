"""A tokenizer of eight words, configs of TRL's trainers, and the features of a completion the slow way."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, RLOOConfig

import oracles
from ebft.integrations.trl import FeatureMatchingReward
from tiny_models import tiny_model

WORDS = ["a", "b", "c", "<eos>", "<pad>", "d", "e", "<unk>"]
EOS = WORDS.index("<eos>")
SETTINGS: dict[str, Any] = dict(
    per_device_train_batch_size=6,
    num_generations=3,
    max_completion_length=4,
    temperature=0.7,
    beta=0.0,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    report_to=[],
    disable_tqdm=True,
    save_strategy="no",
)


def word_tokenizer(first: str = "a b c") -> PreTrainedTokenizerFast:
    """One token per word, so that a vocabulary is small enough for completions to end by themselves."""
    words = [*first.split(), *WORDS[3:]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def word_model(seed: int = 0, **options):
    """A tiny model over these words; the feature network where nothing else is said."""
    return tiny_model(seed=seed, vocab_size=len(WORDS), eos_token_id=EOS, pad_token_id=4, bos_token_id=None, **options)


def rloo_config(folder="unused", **settings) -> RLOOConfig:
    return RLOOConfig(output_dir=str(folder), **(SETTINGS | settings))


def grpo_config(folder="unused", **settings) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), **(SETTINGS | {"scale_rewards": False} | settings))


def word_reward(args=None, **options) -> FeatureMatchingReward:
    """The reward with a float64 network of random weights, without whitening unless asked for."""
    options = {"whitening": "none"} | options
    return FeatureMatchingReward(
        options.pop("feature_model", None) or word_model(seed=1),
        args or rloo_config(),
        options.pop("processing_class", None) or word_tokenizer(),
        **options,
    )


@torch.no_grad()
def slow_features(
    model, prompt: list[int], completion: list[int], pooling="last_token", norm="joint", layers=(1, 2, 3)
) -> Tensor:
    """[D], float64: a run of its own, without padding and over all layers."""
    of_tokens = oracles.token_features(model, list(layers), torch.tensor([*prompt, *completion]), norm)
    return oracles.pool(of_tokens[len(prompt) :], pooling)
