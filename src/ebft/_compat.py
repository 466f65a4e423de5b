"""The only file that touches private or version-dependent names of other libraries."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import PreTrainedConfig, Trainer, TrainingArguments

# Fields of TrainingArguments that the command line may give as JSON.
DICT_FIELDS: list[str] = TrainingArguments._VALID_DICT_FIELDS


def attention_of(config: PreTrainedConfig) -> str:
    """Name of the attention implementation a model uses."""
    return config._attn_implementation or "sdpa"


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Switch the attention implementation of the model that has this config; the public setter knows fewer names."""
    config._attn_implementation = name


def revision_of(config: PreTrainedConfig) -> str | None:
    """Commit of the Hub repository a config was read from."""
    return getattr(config, "_commit_hash", None)


def is_stateful(model_class: Any) -> bool:
    """Whether a model class carries a recurrent state instead of keys and values."""
    return bool(getattr(model_class, "_is_stateful", False))


def attention_is_replaceable(model_class: Any) -> bool:
    """Whether a model class takes its attention from `AttentionInterface`."""
    return bool(getattr(model_class, "_supports_attention_backend", False))


def loss_is_whole_steps(trainer: Trainer) -> None:
    """Tell a Trainer that its loss is already divided by the whole step's denominators.

    Two names: before and after transformers 5.19. Set wrongly, gradients are too small by the accumulation steps.
    """
    trainer.model_accepts_loss_kwargs = True
    trainer.loss_is_scaled_for_ga = True


def close_progress_bars() -> None:
    """Close every tqdm bar that is open, whoever opened it."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def with_child(module: nn.Module, name: str, child: nn.Module) -> Any:
    """A view of `module` in which one child is another; shares everything else, and leaves `module` as it is."""
    view = copy.copy(module)
    view._modules = {**module._modules, name: child}
    return view


def memory_events(run: Callable[[], Any]) -> list[int]:
    """Bytes that torch's CPU allocator handed out (positive) and took back (negative) during `run()`, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return [change for _, change in sorted(memory, key=lambda event: event[0])]
