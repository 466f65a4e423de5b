"""From an EBFTConfig to TRL's: one set of options for all methods, so that only the method differs."""

import copy
from dataclasses import fields
from typing import Any, TypeVar

from transformers import TrainingArguments
from trl import RLOOConfig, SFTConfig

from ..config import EBFTConfig
from ..pickles import SAFE

Config = TypeVar("Config", SFTConfig, RLOOConfig)

# Settings of ours that are not transformers' and that a method reads; the others would do nothing.
READ_BY = {
    "sft": (
        *("model_init_kwargs", "max_length", "completion_only_loss", "assistant_only_loss", "split_turns"),
        *("reasoning_tags", "dataset_num_proc"),
    ),
    "rlvr": (
        *("model_init_kwargs", "max_length", "num_generations", "temperature", "top_k", "top_p", "beta"),
        *("max_completion_length", "rollout_save_steps"),
    ),
}
# As TRL has them; EBFT's own default is smaller than SFT's.
LEARNING_RATES = {"sft": 2e-5, "rlvr": 1e-6}


def check_read(args: EBFTConfig, method: str) -> None:
    """Refuse settings that only EBFT has: a run would be taken for what it is not.

    Raises:
        ValueError: Names the first setting that is not at its default and does nothing here.
    """
    default = EBFTConfig(output_dir=str(args.output_dir), use_cpu=args.use_cpu)
    for name in read_by_ebft_alone(method):
        if getattr(args, name) != getattr(default, name):
            raise ValueError(f"{name}={getattr(args, name)!r} does nothing with method: {method}; remove it.")


def read_by_ebft_alone(method: str) -> list[str]:
    """Settings of EBFTConfig that another method does not read."""
    theirs = {spec.name for spec in fields(TrainingArguments)}
    return [name for name in EBFTConfig.__annotations__ if name not in theirs and name not in READ_BY[method]]


def loading_options(args: EBFTConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: weights are trained in float32, as EBFT's are."""
    given: Any = args.model_init_kwargs or {}
    return {"dtype": "float32", **SAFE, **given}


def trl_config(kind: type[Config], args: EBFTConfig, method: str, **settings: Any) -> Config:
    """TRL's configuration with the values of ours.

    Args:
        kind: `SFTConfig` or `RLOOConfig`.
        args: Ours.
        method: `sft` or `rlvr`, for the default learning rate.
        settings: Of TRL alone, or in place of ours.
    """
    args = copy.copy(args)
    args.learning_rate = LEARNING_RATES[method] if args.learning_rate is None else args.learning_rate
    shared = [spec.name for spec in fields(TrainingArguments) if spec.init]
    values = {name: getattr(args, name) for name in shared}
    # Only what differs: transformers turns some of its own defaults into forms that it does not take back.
    always = {name: values[name] for name in ("output_dir", "use_cpu", "bf16")}
    defaults = kind(**always)
    given = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    return kind(**always | given | settings)
