"""`ebft plan`: the options of a run in, its cost out; reads no weights, needs no GPU, fails where training would."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from ebft.cli.arguments import Arguments
    from ebft.config import EBFTConfig
    from ebft.features import FeatureNetwork
    from ebft.footprint import Footprint
    from ebft.planning import Documents

HELP = """\
usage: ebft plan --model_name_or_path MODEL [--dataset_name DATA] [--option value ...] [--json] [--calibrate]
       ebft plan --config FILE.yaml [--option value ...] [--json] [--calibrate | --flops RATE] [--memory GIB]

Says what `ebft train` with the same options would do: settings, documents and blocks, updates, work per update beside
that of SFT, parameters, memory, the largest micro-batch that fits, time. It reads the model's configuration, its
tokenizer and the data, but no weights, and it refuses what training would refuse. Without --dataset_name it plans for
documents of --max_length tokens.

examples:
  ebft plan --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my.jsonl
  ebft plan --config recipe.yaml --per_device_train_batch_size 8 --gradient_checkpointing
  ebft plan --config recipe.yaml --calibrate --json > plan.json
  ebft plan --config recipe.yaml --bf16 true --use_cpu --flops 4e14 --memory 80   for a GPU, on a machine without one

  --json        print JSON instead of tables, with bytes in place of GiB
  --calibrate   times the engine on this machine, on a few layers with random weights (a minute or two), for the time
  --flops RATE  matrix rate of one device in FLOP/s, for the time: of matrix products alone
  --bandwidth GB/S  between the processes, for the time of their communication (docs/scaling.md)
  --memory GIB  memory of the GPU to plan for; otherwise that of this machine's, or of a CPU what is available
                (with --calibrate: of this machine's device, what may be used)
  ebft train --help-all lists all other options
"""

GIB = 2**30
SETTINGS = (
    *("rollout", "max_length", "context_length", "stride", "completion_length", "max_completion_length"),
    *("num_generations", "max_blocks"),
    *("packing", "document_masking", "temperature", "top_p", "top_k"),
    *("pooling", "feature_norm", "kernel", "whitening", "advantage_estimator"),
    *("rl_coef", "ce_coef", "beta", "alignment_coef", "diversity_coef", "learning_rate", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "bf16", "seed"),
    *("gradient_checkpointing", "output_dir"),
)


def run(argv: list[str]) -> None:
    """Print the plan; see HELP.

    Args:
        argv: The words after `ebft plan`.

    Raises:
        ValueError: Training would refuse the options, the data or the model.
        OSError: A file or a model's configuration cannot be read.
    """
    from ebft.cli.arguments import parse

    arguments = parse(argv, "plan")
    plan = make_plan(arguments)
    if arguments.plan is not None and arguments.plan.json:
        print(json.dumps(plan, indent=2))
    else:
        _print_tables(plan)


def make_plan(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Go through what training does before its first update, without weights, and add up the costs.

    Args:
        arguments: The parsed options.

    Returns:
        One mapping of names to JSON values per section; bytes, seconds, floating-point operations.
    """
    import torch
    from transformers import SchedulerType
    from trl import get_peft_config, get_quantization_config

    from ebft import feature_models, models, pretrained
    from ebft.cli.engines import check_runs_ebft
    from ebft.cli.train import find_checkpoint, from_pretrained_options
    from ebft.engine_checks import check_engine

    data, args, model = arguments[:3]
    name = str(model.model_name_or_path)
    find_checkpoint(args, writes=False)
    check_runs_ebft(data.accelerate_config)
    if args.deepspeed:
        check_engine(args)
    if data.num_processes == 1:
        args.check_one_device()
    args.model_init_kwargs = from_pretrained_options(arguments)
    tokenizer = pretrained.load_policy_tokenizer(name, args)
    models.complete_stop_token_ids(args, name, tokenizer)
    rows, documents, anchors, evaluates = _documents(arguments, tokenizer)
    with torch.device("meta"):
        adapter = get_peft_config(model)
        policy = models.load_policy(name, args, adapter, get_quantization_config(model))
        network = None
        if (args.rl_coef or evaluates) and args.kernel != "ngram":
            source = args.feature_model_name_or_path
            network = feature_models.load_feature_network(policy, args, source, tokenizer)
        needed = args.beta and args.rl_coef
        reference = models.load_reference(policy, new_adapter=adapter is not None) if needed else None
    args.learning_rate = args.learning_rate or models.default_learning_rate(policy)

    footprint = _footprint(arguments, policy, network, reference)
    settings = {"model": name, "data": data.dataset_name or None, "processes": data.num_processes}
    settings |= {"engine": footprint.engine, "anchors": anchors}
    settings |= {field: getattr(args, field) for field in SETTINGS}
    settings["lr_scheduler_type"] = SchedulerType(args.lr_scheduler_type).value
    reuses = footprint.method.reuses(footprint.checkpointing)
    settings["reuse_sampling_forward"] = reuses and bool(args.rl_coef)
    run = _Run(arguments, rows, documents, anchors, policy, network, footprint)
    return {"settings": settings, "model": _model(policy, network, args)} | _costs(run)


class _Run(NamedTuple):
    """What training would start with, without weights."""

    arguments: Arguments
    rows: Any
    documents: Documents
    anchors: str
    policy: nn.Module
    network: FeatureNetwork | None
    footprint: Footprint


def _documents(arguments: Arguments, tokenizer) -> tuple[Any, Documents, str, bool]:
    """The tokenised rows, their documents' sizes, where blocks go, and whether there is evaluation."""
    from ebft.cli.train import load_datasets
    from ebft.planning import Documents
    from ebft.prepare import prepare_datasets
    from ebft.sizes import survey

    data, args = arguments.data, arguments.training
    train, evaluation, anchors = None, None, args.anchors or "all"
    if data.dataset_name:
        datasets = load_datasets(data, evaluate=args.eval_strategy != "no", seed=args.seed)
        train, evaluation, anchors = prepare_datasets(*datasets, tokenizer, args, None)
    if train is not None and hasattr(train, "__len__"):
        return train, survey(train, args, anchors), anchors, evaluation is not None
    sizes = (args.max_length, args.stride, args.context_length, args.completion_length)
    if args.rollout == "completion":  # one behind a prompt that is as long as may be
        sizes = (args.max_length, 1, args.max_length - 1, 1)
    documents = Documents.of_length(*sizes, args.max_blocks if args.rl_coef else 0)
    return None, documents, anchors, evaluation is not None


def _model(policy: nn.Module, network: FeatureNetwork | None, args: EBFTConfig) -> dict[str, Any]:
    """The model, how it attends, and its feature network."""
    from ebft._compat import attention_of
    from ebft.forward import causal_lm, packs

    config = causal_lm(policy).config
    section: dict[str, Any] = {
        "type": config.model_type,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "trained parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        "attention": f"block-parallel on {attention_of(config).removeprefix('ebft_')}"
        if packs(causal_lm(policy))
        else "its own; every rollout is a row with its whole prefix, which the costs below do not count",
    }
    if network is None:
        return section | {"feature network": None}
    source = args.feature_model_name_or_path or "the base model"
    shared = ", adapters off: no copy" if network.model is policy else ""
    return section | {
        "feature network": source + shared,
        "feature layers": network.layer_indices,
        "of so many layers": _depth(network),
        "feature size": network.size(args.completion_length),
    }


def _costs(run: _Run) -> dict[str, Any]:
    """The sections about cost."""
    from ebft import planning

    args, processes, footprint = run.arguments.training, run.arguments.data.num_processes, run.footprint
    documents, accumulation = run.documents, args.gradient_accumulation_steps
    batch = args.per_device_train_batch_size
    per_epoch, in_all = planning.optimiser_steps(
        documents.rows, batch, processes, accumulation, args.num_train_epochs, args.max_steps
    )
    count, work = documents.step(batch * processes * accumulation)
    method, checkpointing = footprint.method, footprint.checkpointing
    rollouts = work.blocks * args.num_generations
    limit, source = _device_memory(run.arguments)
    operations = planning.operations(work, method, footprint.policy, footprint.feature, checkpointing)
    return {
        "data": _data(documents) | {"updates per epoch": per_epoch, "updates": in_all},
        "update": {
            "documents": count,
            "document tokens": work.tokens,
            "blocks": work.blocks,
            "rollouts": rollouts,
            "generated tokens": rollouts * args.rollout_length,
        },
        "token-forwards": {
            "without checkpointing": planning.token_forwards(work, method, checkpointing=False),
            "with checkpointing": planning.token_forwards(work, method, checkpointing=True),
        },
        "memory": footprint.memory(documents.largest_row, batch),
        "fit": _fit(footprint, documents, args, limit) | {"memory taken from": source},
        "time": _time(run, operations, in_all, limit),
    } | _communication(run)


def _footprint(arguments: Arguments, policy: nn.Module, network, reference) -> Footprint:
    """What the run holds in memory, and how it goes about an update."""
    import torch

    from ebft.cli.engines import engine_of
    from ebft.engine_checks import engine_of_run
    from ebft.sizes import run_footprint

    data, args, model, _, plan = arguments
    # Given memory is a GPU's, with its larger chunks, unless this machine is to be timed.
    elsewhere = plan is not None and plan.memory is not None and not plan.calibrate
    return run_footprint(
        args,
        policy,
        network,
        reference,
        processes=data.num_processes,
        engine=engine_of_run(args) if args.deepspeed else engine_of(data.accelerate_config),
        frozen=0.5 if model.load_in_4bit else 1 if model.load_in_8bit else None,
        device=torch.device("cuda") if elsewhere else args.device,
    )


def _device_memory(arguments: Arguments) -> tuple[float, str]:
    """Bytes of one device, and where they are known from."""
    from ebft.memory_guard import device_memory

    if arguments.plan is not None and arguments.plan.memory is not None:
        return arguments.plan.memory * GIB, "--memory"
    device = arguments.training.device
    return device_memory(device, available=True), "available RAM" if device.type == "cpu" else f"{device}, all of it"


def _fit(footprint: Footprint, documents: Documents, args: EBFTConfig, limit: float) -> dict[str, Any]:
    """Whether the micro-batch fits, the largest that does, and what to change."""
    from ebft.footprint import largest_batch, sampled_at_once, what_fits

    row, batch = documents.largest_row, args.per_device_train_batch_size
    needed = footprint.memory(row, batch)["total"]
    fits = needed <= limit
    largest = largest_batch(footprint, row, limit)
    with_it = sampled_at_once(footprint, row, largest, limit) if largest else ""
    change = None if fits else what_fits(footprint, row, batch, args.gradient_accumulation_steps, limit)
    return {
        "per_device_train_batch_size": batch,
        "fits": f"{'yes' if fits else 'NO'}: {needed / GIB:.2f} of {limit / GIB:.2f} GiB",
        "largest that fits": f"{largest}, with {with_it}" if with_it else largest,
        "to make it fit": change,
    }


def _depth(network: FeatureNetwork) -> int:
    """Layers of the whole model that the feature network is cut from."""
    return network.decoder.config.get_text_config().num_hidden_layers


def _data(documents: Documents) -> dict[str, Any]:
    if documents.rows is None:
        return {"documents": None, "note": "not counted (no dataset_name, or a stream): planned for max_length tokens"}
    tokens, blocks = ([size[i] for size in documents.sizes] for i in (0, 1))
    return {
        "rows": documents.rows,
        "documents": len(tokens),
        "documents without a block": blocks.count(0),
        "tokens per document": {"min": min(tokens), "mean": sum(tokens) / len(tokens), "max": max(tokens)},
        "blocks per document": {"min": min(blocks), "mean": sum(blocks) / len(blocks), "max": max(blocks)},
    }


def _time(run: _Run, operations: dict[str, float], updates: int | None, limit: float) -> dict[str, Any]:
    """Seconds of an update by stage: measured, or matrix products alone at a given rate, or unknown."""
    plan, processes = run.arguments.plan, run.arguments.data.num_processes
    section: dict[str, Any] = {"operations per update": operations | {"total": sum(operations.values())}}
    if plan is not None and plan.calibrate:
        section |= _calibrated(run, section["operations per update"], limit)
    elif plan is None or plan.flops is None:
        return section | {"seconds per update": None, "note": "unknown: give --calibrate, or --flops"}
    else:
        counts = section["operations per update"].items()
        rate = f"{plan.flops:.3g} FLOP/s on each of {processes} device(s)"
        section |= {
            "seconds per update": {stage: count / (plan.flops * processes) for stage, count in counts},
            "note": f"assumed: matrix products at {rate}, and nothing else",
        }
    total = section["seconds per update"]["total"]
    return section | {"seconds in all": None if updates is None else total * updates}


def _communication(run: _Run) -> dict[str, Any]:
    """What each of several processes sends in an update."""
    from ebft.communication import bytes_per_update

    args, footprint = run.arguments.training, run.footprint
    if footprint.processes == 1:
        return {}
    accumulation, batch = args.gradient_accumulation_steps, args.per_device_train_batch_size
    sent = bytes_per_update(footprint, accumulation, math.ceil(accumulation / max(1, footprint.sampled // batch)))
    section: dict[str, Any] = {"bytes sent per update": sent}
    bandwidth = None if run.arguments.plan is None else run.arguments.plan.bandwidth
    if bandwidth is None:
        return {"communication": section | {"note": "of each process; for seconds give --bandwidth"}}
    section["seconds per update"] = {name: size / (bandwidth * 1e9) for name, size in sent.items()}
    note = f"assumed: {bandwidth:g} GB/s out of each process, no latency, nothing at the same time"
    return {"communication": section | {"note": note}}


def _calibrated(run: _Run, operations: dict[str, float], limit: float) -> dict[str, Any]:
    """Seconds by stage, from the engine's own stages timed on this machine."""
    import torch

    from ebft import calibration, measuring

    args, documents, processes = run.arguments.training, run.documents, run.arguments.data.num_processes
    footprint = run.footprint
    rate = measuring.matrix_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    one_layer = calibration.one_layer_operations(footprint, documents)
    most = calibration.most_rows(footprint, documents.largest_row, one_layer, limit, args.device)
    batch = calibration.typical_micro_batch(run.rows, documents, args, run.anchors, footprint.method, most)
    measured = calibration.stage_seconds(args, run.policy, run.network, footprint.method, batch)
    micro_batches = args.gradient_accumulation_steps
    if documents.rows is not None:
        micro_batches = min(micro_batches, documents.rows / (args.per_device_train_batch_size * processes))
    optimiser = measured.pop("optimiser")
    stages = {name: value * max(1, micro_batches) for name, value in measured.items()}
    stages["update"] += optimiser
    stages["total"] = sum(stages.values())
    devices = "" if processes == 1 else f"; on each of {processes} devices, without the sum of their gradients"
    return {
        "seconds per update": stages,
        "seconds of the optimiser's step in it": optimiser,
        "matrix rate in FLOP/s": rate,
        "share of the matrix rate": operations["total"] / processes / stages["total"] / rate,
        "note": f"measured on {args.device} ({torch.get_num_threads()} CPU threads): the engine's stages on "
        f"{batch.rows} row(s), random weights, 1 layer and 3 layers; scaled to all layers and micro-batches{devices}",
    }


def _print_tables(plan: dict[str, dict[str, Any]]) -> None:
    """The plan as tables: a section's single values in one, its mappings as the columns of another."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, section in plan.items():
        text = _gib if title == "memory" else _text
        columns = {name: value for name, value in section.items() if isinstance(value, dict)}
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        for name in (name for name in section if name not in columns):
            table.add_row(name, text(section[name]))
        if table.row_count:
            console.print(table)
        if columns:
            table = Table("", *columns, title=title, title_justify="left", min_width=60)
            for name in next(iter(columns.values())):
                table.add_row(name, *(text(column[name]) for column in columns.values()))
            console.print(table)


def _gib(value: float) -> str:
    return f"{value / GIB:.3f} GiB"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
