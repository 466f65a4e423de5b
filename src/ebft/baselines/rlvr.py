"""RLVR: `trl.RLOOTrainer` on the prompts of the documents that EBFT would train on, with a verifiable reward."""

import warnings
from typing import Any

from trl import RLOOConfig, RLOOTrainer

from .. import models, pretrained
from ..config import EBFTConfig
from ..data import has_prompt
from ..support import check_tokenizer
from .kept import DOCUMENT, KeptCompletions
from .recording import recorded
from .rewards import Reward
from .settings import check_read, loading_options, trl_config

REFERENCE = "reference"  # the column of the completions: TRL keeps its own `completion` from a reward function


def rlvr_trainer(
    model: str,
    args: EBFTConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    reward: Reward,
    max_completion_length: int,
    description: dict[str, Any],
    peft_config: Any = None,
    quantization_config: Any = None,
) -> RLOOTrainer:
    """A trainer ready for `train()`, which leaves the same files as EBFT's.

    Each of the `per_device_train_batch_size` documents gives its prompt, which `num_generations` completions are
    sampled of; one update per batch of them, as in EBFT.

    Args:
        model: Hub name or path.
        args: The settings of all methods; those of EBFT alone must be at their defaults.
        train_dataset: Rows of `prompt` and `completion`, with what the reward reads.
        eval_dataset: Likewise, or None.
        reward: A reward function of TRL's: (prompts, completions, **columns) -> rewards.
        max_completion_length: Longest completion, in tokens.
        description: Settings outside `args`, for `resolved_config.yaml`.
        peft_config: Adapter to train instead of the model.
        quantization_config: For the model.

    Raises:
        ValueError: A setting does nothing here, or model or data cannot be used.
    """
    check_read(args, "rlvr")
    if args.num_generations < 2:
        raise ValueError(f"num_generations={args.num_generations}: RLVR compares completions, use 2 or more.")
    config = models.check_named_policy(model, args)
    tokenizer = pretrained.load_policy_tokenizer(model, args)
    check_tokenizer(tokenizer, config)
    train = prompts_of(train_dataset, tokenizer, args.max_length, "train_dataset")
    evaluation = None
    if eval_dataset is not None:
        evaluation = prompts_of(eval_dataset, tokenizer, args.max_length, "eval_dataset")
    # TRL counts completions where we count documents.
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "beta")}
    settings |= {"num_generations": args.num_generations, "max_completion_length": max_completion_length}
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        settings[name] = getattr(args, name) * args.num_generations
    settings["model_init_kwargs"] = loading_options(args)
    check = getattr(reward, "check", None)
    if check is not None:
        for rows, label in ((train, "train_dataset"), (evaluation, "eval_dataset")):
            check(rows or [], label)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if len(train) < step:  # TRL leaves out what fills no whole step, and would end without one
        raise ValueError(
            f"train_dataset has {len(train)} prompts, but one update takes {step} (per_device_train_batch_size x "
            "gradient_accumulation_steps x processes): lower one of these, or give more prompts."
        )
    tokenizer.padding_side = "left"
    kept = KeptCompletions(reward, tokenizer, args.rollout_save_steps, args.num_generations)
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=kept,
        args=trl_config(RLOOConfig, args, "rlvr", **settings),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    kept.write_for(trainer)
    return recorded(trainer, args, description, "rlvr", names={})


def prompts_of(dataset: Any, tokenizer: Any, max_length: int, label: str) -> Any:
    """The rows whose prompt leaves room in a document, as EBFT's own documents are chosen.

    Raises:
        ValueError: The rows have no prompts, or none leaves room.
    """
    for column in ("messages", "conversations"):
        if column in dataset.column_names and "prompt" not in dataset.column_names:
            raise ValueError(
                f"{label} holds `{column}`: RLVR completes one prompt per row, and a conversation may have several "
                "turns. Give each turn as a row of `prompt` (its history as a string) and `completion`, or choose "
                "method: sft or ebft."
            )
    if "prompt" not in dataset.column_names or not has_prompt(dataset):
        raise ValueError(
            f"{label} has the columns {dataset.column_names}: RLVR rewards completions of prompts, and text without "
            "prompts has none. Give `prompt` and `completion`, or choose method: sft or ebft."
        )
    first = dataset[0]["prompt"]
    if not isinstance(first, str):
        raise ValueError(
            f"{label}: `prompt` is {type(first).__name__}: for method: rlvr make it a string (of messages: what the "
            "chat template renders, with its generation prompt)."
        )
    dataset = dataset.add_column(DOCUMENT, list(range(len(dataset))))
    kept = dataset.filter(lambda row: len(tokenizer(text=row["prompt"])["input_ids"]) < max_length)
    if not len(kept):
        raise ValueError(f"{label}: no prompt is shorter than max_length={max_length}: raise it.")
    if len(kept) < len(dataset):
        warnings.warn(
            f"{label}: {len(dataset) - len(kept)} document(s) dropped, whose prompt alone fills "
            f"max_length={max_length}",
            stacklevel=2,
        )
    return kept.rename_column("completion", REFERENCE)
