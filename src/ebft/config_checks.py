"""Checks of `EBFTConfig`, each of one part of a run: completions, feature network, vLLM, Liger, what is refused."""

import difflib
import os
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ._compat import has_cpp_compiler, ways_to_compile
from .credentials import check_no_credentials
from .extras import require
from .features import POOLINGS_OF_COMPLETIONS
from .liger import LOSSES as LIGER_LOSSES
from .liger import WITHOUT_LOSSES

WITH_CUDA_GRAPHS = ("cudagraphs", "reduce-overhead", "max-autotune")  # a backend and modes of `torch.compile`


def check_parts(args: Any) -> None:
    """Check that nothing is secret, how rollouts are made, and what judges them.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    _keep_token_apart(args)
    check_no_credentials(vars(args))
    check_completions(args) if args.rollout == "completion" else check_blocks(args)
    check_vllm(args)
    check_feature_network(args)
    check_loggers(args)
    check_groups(args)


def check_groups(args: Any) -> None:
    """Refuse rewards and baselines that a group of rollouts cannot give.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    n = args.num_generations
    if n < 2 and args.diversity_coef:
        raise ValueError(
            f"num_generations={n} has no pairs for diversity_coef={args.diversity_coef}: "
            "use num_generations >= 2 or diversity_coef: 0."
        )
    if n < 2 and args.advantage_estimator != "none":
        raise ValueError(
            f"num_generations={n} gives advantage_estimator='{args.advantage_estimator}' nothing to compare with: "
            "use num_generations >= 2 or advantage_estimator: none."
        )
    if args.alignment == "dot" and args.whitening != "none":
        raise ValueError(
            f"alignment='dot' contradicts whitening='{args.whitening}', whose alignment is a cosine: "
            "leave alignment unset or set whitening: none."
        )


def _keep_token_apart(args: Any) -> None:
    """Move `hub_token` into the environment: every checkpoint and every push holds a pickle of the settings."""
    if args.hub_token:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def check_completions(args: Any) -> None:
    """Refuse what rollouts of whole completions cannot have.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if args.pooling not in POOLINGS_OF_COMPLETIONS:
        raise ValueError(
            f"pooling='{args.pooling}' needs rollouts of one length, which those of rollout='completion' are not: "
            f"use {' or '.join(POOLINGS_OF_COMPLETIONS)}."
        )
    if args.anchors == "all":
        raise ValueError(
            "anchors='all' with rollout='completion': a whole completion starts behind a prompt; leave anchors "
            "unset, or use rollout: blocks for text without prompts."
        )
    stops = args.stop_token_ids
    listed = isinstance(stops, (list, tuple)) and len(stops) > 0 and all(type(x) is int and x >= 0 for x in stops)
    if stops is not None and not listed:
        raise ValueError(f"stop_token_ids={stops!r}: give a list of token ids, or leave it unset for EOS.")
    _refuse_without(args, "rollout: blocks", "stride", "context_length", "completion_length")
    for name in ("random_anchor_offset", "reuse_sampling_forward"):
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)} is for rollout: blocks: leave it unset.")


def check_feature_network(args: Any) -> None:
    """Refuse a moving average that cannot be kept, a classifier that cannot learn, and options without effect.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if not 0 < args.feature_ema_decay < 1:
        raise ValueError(f"feature_ema_decay={args.feature_ema_decay} must be in (0, 1).")
    if not 0 < args.feature_classifier_learning_rate < float("inf"):
        raise ValueError(
            f"feature_classifier_learning_rate={args.feature_classifier_learning_rate} must be above 0 and finite."
        )
    for network, option in (("ema", "feature_ema_decay"), ("learned", "feature_classifier_learning_rate")):
        if args.feature_network != network and getattr(args, option) != getattr(type(args), option):
            raise ValueError(
                f"{option}={getattr(args, option)} does nothing with feature_network='{args.feature_network}': leave "
                f"it unset, or set feature_network: {network}."
            )
    if args.feature_network != "pretrained" and args.kernel == "ngram":
        raise ValueError(
            f"feature_network='{args.feature_network}' does nothing with kernel='ngram', which needs no network: "
            "leave it unset, or choose another kernel."
        )
    if args.feature_network == "learned" and args.feature_norm == "none":
        raise ValueError(
            "feature_norm='none' with feature_network='learned', whose classifier takes features of length 1: use "
            "joint or per_layer."
        )
    if args.feature_network != "ema":
        return
    if args.feature_model_name_or_path is not None:
        raise ValueError(
            f"feature_model_name_or_path='{args.feature_model_name_or_path}' with feature_network='ema', which is "
            "the policy's own average: keep one of the two."
        )
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "feature_network='ema' needs the policy's whole weights on every process, which FSDP and DeepSpeed "
            "shard: use pretrained or random."
        )


def check_vllm(args: Any) -> None:
    """Refuse vLLM where it cannot sample, or is not installed.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if not args.use_vllm:
        _refuse_without(args, "use_vllm: true", *(name for name in vars(args) if name.startswith("vllm_")))
        return
    if args.vllm_mode == "colocate":
        _refuse_without(args, "vllm_mode: server", "vllm_server_base_url")
    else:
        _refuse_without(args, "vllm_mode: colocate", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode")
    if args.rollout != "completion":
        raise ValueError("use_vllm=True: vLLM cannot sample blocks: set rollout: completion, or leave it off.")
    if not 0 < args.vllm_gpu_memory_utilization < 1:
        raise ValueError(f"vllm_gpu_memory_utilization={args.vllm_gpu_memory_utilization} must be in (0, 1).")
    require("vllm", "vllm", "use_vllm=True")


def check_loggers(args: Any) -> None:
    """Refuse loggers that are unknown or not installed, which transformers does when the weights are there.

    Raises:
        ValueError: Names the logger, and what installs it.
    """
    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            nearest = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1, cutoff=0.0)[0]
            raise ValueError(f"report_to='{name}' is unknown: did you mean {nearest}? `none` is none.")
        if name not in installed:
            package = f"'ebft[{name}]'" if name in ("wandb", "tensorboard", "trackio") else name
            raise ValueError(f"report_to='{name}' is not installed: pip install {package}, or set report_to: none.")


def check_liger(args: Any) -> None:
    """Leave out Liger's losses, and refuse them where they are asked for.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if not args.use_liger_kernel:
        return
    given = args.liger_kernel_config or {}
    losses = [name for name in LIGER_LOSSES if given.get(name)]
    if losses:
        raise ValueError(
            f"liger_kernel_config: {losses[0]} replaces the forward that block rollouts need: leave it out "
            "(the LM head runs in chunks anyway)."
        )
    args.liger_kernel_config = {**given, **WITHOUT_LOSSES}


def no_tf32_unasked(args: Any) -> None:
    """Keep transformers from rounding all float32 products, rewards among them, because of `torch_compile`."""
    if (args.torch_compile or args.torch_compile_backend or args.torch_compile_mode) and args.tf32 is None:
        args.tf32 = False


def check_compile(args: Any) -> None:
    """Refuse ways to compile that are unknown or cannot be right, or that do again what is done already.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if not args.torch_compile:
        return
    for name, known in zip(("torch_compile_backend", "torch_compile_mode"), ways_to_compile(), strict=True):
        value = getattr(args, name)
        if value is not None and value not in known:
            raise ValueError(f"{name}={value!r} is unknown: leave it unset, or use one of {', '.join(known)}.")
        if value in WITH_CUDA_GRAPHS:
            raise ValueError(
                f"{name}={value!r} records CUDA graphs, which need sizes that stay: leave it unset, or use "
                "torch_compile_mode: max-autotune-no-cudagraphs."
            )
    if args.use_liger_kernel:
        raise ValueError(
            "torch_compile=True and use_liger_kernel=True are two ways to fuse the same operations: use one."
        )


def check_offloading(args: Any) -> None:
    """Refuse offloading of more than checkpoints.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if args.activation_offloading and not args.checkpoints_activations:
        raise ValueError(
            "activation_offloading=True moves what gradient_checkpointing keeps; all activations are too many to be "
            "moved: add gradient_checkpointing: true."
        )


def check_runs_here(args: Any) -> None:
    """Refuse what this machine cannot run; a plan for another one does not ask.

    Raises:
        ValueError: A package, a compiler or a GPU is missing.
    """
    no_gpu = args.use_cpu or not torch.cuda.is_available()
    if args.use_liger_kernel:
        require("liger_kernel", "liger", "use_liger_kernel=True")
        if no_gpu:
            raise ValueError("use_liger_kernel=True: its kernels need a GPU: leave it off.")
    if args.activation_offloading and no_gpu:
        raise ValueError("activation_offloading=True moves memory from a GPU to the CPU's: leave it off.")
    writes_cpp = args.torch_compile and args.torch_compile_backend in (None, "inductor") and args.device.type == "cpu"
    if writes_cpp and not has_cpp_compiler():
        raise ValueError(
            "torch_compile=True needs a C++ compiler, on a CPU: install g++, name yours in CXX, or leave it off."
        )


def check_refused(args: Any) -> None:
    """Refuse transformers' settings that cannot be right here.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    reasons = {
        "fp16": "float16 is not supported: use bf16: true, or neither for float32",
        "auto_find_batch_size": "it would change the step's batch: set per_device_train_batch_size",
        "logging_nan_inf_filter": "it hides a NaN loss: leave it off",
        "bf16_full_eval": "it would round the float32 weights: leave it off, autocast is used anyway",
        "fp16_full_eval": "it would round the float32 weights: leave it off",
        "neftune_noise_alpha": "noise in the policy's forward makes log-probs differ from those sampled: unset it",
        "label_smoothing_factor": "the cross-entropy is that of the tokens: set it to 0",
        "enable_jit_checkpoint": "SIGTERM writes a checkpoint anyway, of a whole step: leave it off",
        "include_num_input_tokens_seen": "num_tokens is logged anyway: leave it at no",
        "remove_unused_columns": "the collator chooses its columns itself: leave it off",
    }
    for name, reason in reasons.items():
        if getattr(args, name, None) not in (None, False, 0, "no"):
            raise ValueError(f"{name}={getattr(args, name)}: {reason}.")
    if str(args.train_sampling_strategy) not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy}: its order is drawn from a stream that "
            "evaluation and resume disturb: use random or sequential."
        )
    accelerator: Any = args.accelerator_config
    if not accelerator.use_seedable_sampler:
        raise ValueError("accelerator_config.use_seedable_sampler=False: resume would not be exact; leave it on.")
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "parallelism_config: context parallelism would cut documents apart; set cp_size and sp_size to 1."
        )


def check_blocks(args: Any) -> None:
    """Refuse what rollouts of blocks do not read.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    _refuse_without(args, "rollout: completion", "stop_token_ids")


def _refuse_without(args: Any, needed: str, *names: str) -> None:
    for name in names:
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            raise ValueError(f"{name}={getattr(args, name)!r} does nothing without {needed}: leave it unset.")
