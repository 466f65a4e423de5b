"""The only file that touches private or version-dependent names of other libraries."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.profiler import ProfilerActivity, profile
from torch.serialization import safe_globals
from tqdm import tqdm
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_available

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


def around_saving(trainer: Trainer, context: Callable[[Path], AbstractContextManager]) -> None:
    """Have a Trainer write each of its checkpoints within `context(folder)`."""
    inner: Any = trainer
    save = inner._save_checkpoint

    def save_within(model: nn.Module, trial: Any) -> None:
        folder = Path(inner._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        with context(folder):
            save(model, trial)

    inner._save_checkpoint = save_within


def before_saving(trainer: Trainer, act: Callable[[], None]) -> None:
    """Have a Trainer call `act` behind each step and epoch, when it is known what is due, and before it is done."""
    inner: Any = trainer
    log_evaluate_save = inner._maybe_log_save_evaluate

    def act_first(*args: Any, **options: Any) -> None:
        act()
        log_evaluate_save(*args, **options)

    inner._maybe_log_save_evaluate = act_first


def no_epochs_where(trainer: Trainer, finished: Callable[[str, int], bool]) -> None:
    """Have a Trainer that resumes a checkpoint go through no epoch where `finished(checkpoint, max_steps)`."""
    inner: Any = trainer
    loop, values = inner._inner_training_loop, inner.set_initial_training_values

    def train(batch_size: int | None = None, **options: Any) -> Any:
        checkpoint = options.get("resume_from_checkpoint")

        def values_of(*args: Any) -> tuple:
            epochs, *others = values(*args)
            return (0 if checkpoint and finished(checkpoint, others[-1]) else epochs, *others)

        inner.set_initial_training_values = values_of
        return loop(batch_size, **options)

    inner._inner_training_loop = train


def deepspeed_classes() -> list[Any]:
    """What DeepSpeed's checkpoints name besides tensors and plain data; none where it is not installed."""
    if not is_deepspeed_available():
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def deepspeed_reads_data_alone() -> Iterator[None]:
    """Have DeepSpeed read checkpoints with `weights_only`, wherever `latest` or a best checkpoint leads it."""
    if not is_deepspeed_available():
        yield
        return
    from deepspeed import DeepSpeedEngine

    load: Any = DeepSpeedEngine.load_checkpoint

    def load_data(*args: Any, **options: Any) -> Any:
        # Stronger than the `weights_only=False` of its calls.
        with patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}), safe_globals(deepspeed_classes()):
            return load(*args, **options)

    with patch.object(DeepSpeedEngine, "load_checkpoint", load_data):
        yield


def prepare_fsdp2(accelerator: Any, precision: MixedPrecisionPolicy) -> None:
    """Have accelerate shard a model as `sharding.shard` does: layers, and a root with all the rest.

    Newer versions make groups of their own of the embeddings and of norm and LM head, whose hooks take it for granted
    that each of them is called once per forward. Gradients are added up over processes at each micro-batch: kept for
    the last one they would be whole on each of them.

    Args:
        accelerator: With an FSDP2 plugin.
        precision: Of the policy.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = precision
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    prepare, hidden = accelerator.prepare, ("get_input_embeddings", "get_output_embeddings")

    def prepared(*objects: Any, **options: Any) -> Any:
        models = [x for x in objects if isinstance(x, nn.Module)]
        for model in models:
            vars(model).update(dict.fromkeys(hidden, lambda: None))
        try:
            return prepare(*objects, **options)
        finally:
            for model in models:
                for name in hidden:
                    del vars(model)[name]

    accelerator.prepare = prepared


def close_progress_bars() -> None:
    """Close every tqdm bar that is open, whoever opened it."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def with_child(module: nn.Module, name: str, child: nn.Module) -> Any:
    """A view of `module` in which one child is another; shares everything else, and leaves `module` as it is."""
    view = copy.copy(module)
    view._modules = {**module._modules, name: child}
    return view


@cache  # entered for every layer; making it anew costs three times as much
def at_most_recompiled(times: int) -> Any:
    """A context, to be entered again and again, in which a function may be compiled for so many kinds of arguments."""
    return torch._dynamo.config.patch(recompile_limit=times)


def with_python_scores(chrf: Any) -> Any:
    """ChrF of sacrebleu with scores that are all Python's numbers.

    In its bootstrap a score of 0 is one, any other is numpy's, and of both together `statistics` makes an error.
    """
    compute = chrf._compute_f_score
    chrf._compute_f_score = lambda counts: float(compute(counts))
    return chrf


def keep_4bit_weights_differentiable(model: Any) -> None:
    """Leave 4-bit weights in the layout that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights for good once it runs in evaluation mode, as
    sampling does; from then on its products have no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def memory_events(run: Callable[[], Any]) -> list[int]:
    """Bytes that torch's CPU allocator handed out (positive) and took back (negative) during `run()`, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiler: Any = profiled.profiler
    events = profiler.kineto_results.events()
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return [change for _, change in sorted(memory, key=lambda event: event[0])]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention` calls on a CPU, which keeps the log-sum-exp of the scores to itself.

    Args:
        query: [B, H, C, d].
        key: [B, H, keys, d].
        value: As `key`.
        bias: Added to the scores, [B or 1, 1, C, keys].
        scale: Of the scores.

    Returns:
        Output [B, H, C, d] and log-sum-exp [B, H, C].
    """
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operation(query, key, value, 0.0, False, attn_mask=bias, scale=scale)


def flash_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of `flash_attention`."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operation(grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale)


def allow_compiling(kinds: int) -> None:
    """Let modules be compiled for so many kinds of forwards; for the whole process, as PyTorch asks at every call."""
    torch._dynamo.config.recompile_limit = max(kinds, torch._dynamo.config.recompile_limit)


def ways_to_compile() -> tuple[list[str], list[str]]:
    """The backends and modes of `torch.compile`."""
    return torch.compiler.list_backends(exclude_tags=()), list(torch._inductor.list_mode_options())


def has_cpp_compiler() -> bool:
    """Whether `torch.compile` finds the compiler that it needs for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
