"""SFT: `trl.SFTTrainer` on the very documents that EBFT would train on."""

import dataclasses
from typing import Any

from trl import SFTConfig, SFTTrainer

from .. import models, pretrained
from ..config import EBFTConfig
from ..prepare import prepare_datasets
from ..support import check_tokenizer
from .recording import recorded
from .settings import check_read, loading_options, trl_config


def sft_trainer(
    model: str,
    args: EBFTConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    description: dict[str, Any],
    peft_config: Any = None,
    quantization_config: Any = None,
) -> SFTTrainer:
    """A trainer ready for `train()`, which leaves the same files as EBFT's.

    Args:
        model: Hub name or path.
        args: The settings of all methods; those of EBFT alone must be at their defaults.
        train_dataset: In one of TRL's formats.
        eval_dataset: Likewise, or None.
        description: Settings outside `args`, for `resolved_config.yaml`.
        peft_config: Adapter to train instead of the model.
        quantization_config: For the model.

    Raises:
        ValueError: A setting does nothing here, or model or data cannot be used.
    """
    check_read(args, "sft")
    config = models.check_named_policy(model, args)
    tokenizer = pretrained.load_policy_tokenizer(model, args)
    check_tokenizer(tokenizer, config)
    # Without blocks, that is: a document too short for one is trained on all the same, as EBFT's own cross-entropy is.
    without_blocks = dataclasses.replace(args, rl_coef=0.0, ce_coef=1.0)
    documents: Any = prepare_datasets(train_dataset, eval_dataset, tokenizer, without_blocks, None)[:2]
    train, evaluation = (None if x is None else x.map(_labelled, remove_columns=x.column_names) for x in documents)
    settings: dict[str, Any] = {"max_length": args.max_length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    settings["model_init_kwargs"] = loading_options(args)
    trainer = SFTTrainer(
        model=model,
        args=trl_config(SFTConfig, args, "sft", **settings),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    # The loss is the cross-entropy of the tokens trained on, which ours is called.
    return recorded(trainer, args, description, "sft", names={"loss": "ce_loss", "eval_loss": "eval_ce_loss"})


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    labels = [token if trained else -100 for token, trained in zip(row["input_ids"], row["loss_mask"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}
