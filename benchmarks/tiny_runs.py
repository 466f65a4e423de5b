"""Runs of a tiny random model on random documents, built in code: what is killed or watched over many steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.fsdp2_on_cpu import FSDP2Trainer
from ebft import EBFTConfig, EBFTTrainer

VOCABULARY = sorted(ByteLevel.alphabet())
SETTINGS: dict[str, Any] = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    max_length=32,
    stride=6,
    context_length=4,
    completion_length=3,
    num_generations=2,
    max_blocks=3,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
)
# What is trained; by two processes, where a kind names an engine for several; how data come, where it names that.
KINDS = ["full", "lora", "full-ddp", "lora-ddp", "full-fsdp2", "lora-fsdp2", "full-stream", "lora-packed"]
ENGINES = {"ddp": EBFTTrainer, "fsdp2": FSDP2Trainer}


def tokenizer() -> PreTrainedTokenizerFast:
    """One whose tokens are bytes."""
    bytes_alone = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(VOCABULARY)}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<eos>", pad_token="<pad>")


def model() -> Qwen2ForCausalLM:
    """Four layers of width 32."""
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=264, num_key_value_heads=1, max_position_embeddings=64, **shape))


def documents(count: int, seed: int = 0) -> Dataset:
    """Random tokens, 12 to 32 of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(12, 33, (count,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(256, (length,), generator=generator).tolist()} for length in lengths]
    )


def processes(kind: str) -> int:
    """That share the work of a kind of run."""
    return 2 if kind.endswith(tuple(ENGINES)) else 1


def trainer(kind: str, folder: Path, steps: int, callbacks: Sequence[Any] = (), **settings: Any) -> EBFTTrainer:
    """A trainer of one kind, ready for `train()`.

    Args:
        kind: One of `KINDS`; for this process, which may be one of several.
        folder: The run's.
        steps: Of the optimiser.
        callbacks: As in transformers.
        **settings: Of `EBFTConfig`, in place of ours.
    """
    trained, _, how = kind.partition("-")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if trained == "lora" else None
    options: dict[str, Any] = SETTINGS | settings
    if how == "packed":
        options |= dict(packing=True, max_blocks=None)
    options["per_device_train_batch_size"] //= processes(kind)
    data: Any = documents(steps * 4 if how == "stream" else 50)
    return ENGINES.get(how, EBFTTrainer)(
        model(),
        EBFTConfig(output_dir=str(folder), max_steps=steps, **options),
        train_dataset=data.to_iterable_dataset() if how == "stream" else data,
        eval_dataset=documents(4, seed=1) if settings.get("eval_strategy", "no") != "no" else None,
        processing_class=tokenizer(),
        peft_config=adapter,
        callbacks=list(callbacks),
    )
