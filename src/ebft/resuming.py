"""What a resumed run may change, and what it may not: its settings and its data against those of the checkpoint."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from transformers import Trainer

from .checkpoints import SHARDS, read_manifest
from .config import EBFTConfig

# The weights do not depend on these: logging, evaluation, saving, loading, where things are. Of data and feature
# network not the name counts, but the content, which is compared.
FREE = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "debug", "rollout_save_steps"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_dataset_name"),
    *("eval_do_concat_batches", "eval_use_gather_object", "per_device_eval_batch_size", "batch_eval_metrics"),
    *("prediction_loss_only", "include_for_metrics", "bf16_full_eval", "fp16_full_eval", "do_eval", "do_train"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataset_num_proc"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps"),
    *("ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_split_size"),
    *("feature_model_name_or_path", "feature_model_revision", "max_train_seconds", "save_seconds"),
    "gather_for_sampling",
    *("early_stopping_patience", "early_stopping_threshold"),
    *("vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
)
# What follows is the same training, but no longer the unbroken run to the bit: its length (schedules stretch with it),
# and what changes rounding alone.
WARNED = (
    *("max_steps", "num_train_epochs", "model_name_or_path", "model_revision", "model_init_kwargs"),
    *("bf16", "tf32", "use_cpu", "dtype", "attn_implementation", "use_liger_kernel", "liger_kernel_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "full_determinism", "use_cache"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "activation_offloading", "reuse_sampling_forward"),
    *("per_device_generation_batch_size", "use_vllm"),
    *("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerate_config"),
)
# They may change together: the documents of a step, which are their product, may not.
DOCUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
DOCS = "docs/reliability.md lists what may change"


def check_run(checkpoint: Path, settings: dict[str, Any], trainer: Trainer) -> None:
    """Compare this run with the one that wrote a checkpoint: its settings, and who can read its optimiser's state.

    Args:
        checkpoint: What is resumed.
        settings: As `resolved_config.yaml` has them.
        trainer: Of this run.

    Raises:
        ValueError: A setting differs that may not, or the optimiser's state is of another engine.
    """
    processes = trainer.args.world_size
    check_settings(checkpoint, settings, processes)
    for engine, ours in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        theirs = any(checkpoint.glob(SHARDS[engine]))
        if theirs != ours:
            so = "with" if theirs else "without"
            raise ValueError(
                f"resume_from_checkpoint='{checkpoint}' was written {so} {engine}, and the optimiser's state is of no "
                f"use to another engine: go on {so} it, or start a new run from a saved model."
            )
    before = read_manifest(checkpoint)["processes"]
    if trainer.is_deepspeed_enabled and before != processes:
        raise ValueError(
            f"resume_from_checkpoint='{checkpoint}' was written by {before} processes, and DeepSpeed goes on with as "
            f"many alone, not with {processes}."
        )


def check_settings(checkpoint: Path, settings: dict[str, Any], processes: int) -> None:
    """Compare the settings of this run with those of the checkpoint.

    Args:
        checkpoint: What is resumed.
        settings: As `resolved_config.yaml` has them.
        processes: How many train.

    Raises:
        ValueError: One differs that may not; the message names it, both values and the remedy.
    """
    manifest = read_manifest(checkpoint)
    before, before_processes = manifest["settings"], manifest["processes"]
    changed = _changed(before | {"num_processes": before_processes}, settings | {"num_processes": processes})
    allowed = {*FREE, *WARNED}
    if _documents(before, before_processes) == _documents(settings, processes):
        allowed |= {*DOCUMENTS}
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        raise ValueError(
            f"resume_from_checkpoint='{checkpoint}' was written with other settings ({_text(refused)}): set them "
            f"back, or start a new run from its weights with model_name_or_path: {checkpoint}; {DOCS}."
        )
    told = {name: values for name, values in changed.items() if name not in FREE}
    if told:
        warnings.warn(
            f"resuming with other settings ({_text(told)}): no longer the unbroken run, to the bit", stacklevel=3
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with both values; one that is not there has its default."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(EBFTConfig) if not _is_factory(spec)}
    pairs = {name: tuple(x.get(name, defaults.get(name)) for x in (before, now)) for name in {**before, **now}}
    return {name: (old, new) for name, (old, new) in sorted(pairs.items()) if old != new}


def _is_factory(spec: Any) -> bool:
    return spec.default_factory is not dataclasses.MISSING


def _documents(settings: dict[str, Any], processes: int) -> int:
    """Documents of one optimiser step, over all processes."""
    sizes = (settings.get(name, getattr(EBFTConfig, name)) for name in DOCUMENTS[:2])
    product = processes
    for size in sizes:
        product *= size
    return product


def _text(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())


def check_data(checkpoint: Path, data: dict[str, Any]) -> None:
    """Compare the training data with those of the checkpoint.

    Args:
        checkpoint: What is resumed; that of a run whose data are a trainer's of TRL says nothing of them.
        data: What `data.fingerprint` says of this run's.

    Raises:
        ValueError: They differ.
    """
    before = read_manifest(checkpoint).get("data")
    if before is None or before == data:
        return
    changed = {name: (before.get(name), data.get(name)) for name in before if before.get(name) != data.get(name)}
    raise ValueError(
        f"resume_from_checkpoint='{checkpoint}': train_dataset is not the one it was trained on ({_text(changed)}): "
        f"bring that back, or start a new run from its weights with model_name_or_path: {checkpoint}."
    )


def check_feature_network(checkpoint: str, record: dict[str, Any] | None, ours: dict[str, Any] | None) -> None:
    """Compare the feature network with that of the checkpoint: its name may change, what it computes may not.

    Args:
        checkpoint: What is resumed.
        record: In the checkpoint; None in one without.
        ours: Of this run; None without.

    Raises:
        ValueError: They differ.
    """
    if record is None or ours is None:
        return
    other = [key for key in record if key not in ("name", "revision") and record[key] != ours.get(key)]
    if other:
        theirs, mine = ({key: str(r.get(key))[:16] for key in ("name", *other)} for r in (record, ours))
        raise ValueError(
            f"resume_from_checkpoint='{checkpoint}' was trained with the feature network {theirs}, not {mine}: "
            "resume with that one."
        )
