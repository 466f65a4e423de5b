"""Axolotl's keys with `rl: ebft`: github.com/axolotl-ai-cloud/axolotl, docs/ebft.qmd and src/axolotl/utils/schemas."""

from types import NoneType
from typing import Any

import yaml

from .authors import scalar
from .rules import Options, Rule, computed, convert, left_out, mapped, refused_unless, same, split_batch

ON_POLICY = left_out("one update per batch of rollouts: the ratio is 1 and nothing is clipped")
ATTENTION = left_out("block attention is chosen by itself")
SERVER = left_out("of the server, which is started apart; here weights are handed over at every update")
TOKENIZER = left_out("the tokenizer's own: save it with the template or tokens that are wanted")
SHARDING = refused_unless((None, [], {}), "several GPUs are accelerate's: `accelerate config`, and remove it")
NO_FILES = left_out("documents are tokenised when a run begins")
ENVIRONMENT = left_out("WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE in the environment")
BATCH = "per_device_train_batch_size, gradient_accumulation_steps"
REMOVE = "remove it"
WHERE_COMPILED = "read there where torch_compile is true; here it would set that"

TABLE: dict[str, Rule] = {
    "rl": refused_unless(("ebft",), "only `rl: ebft` is converted"),
    # ebft
    "ebft.mode": mapped("rollout", {"strided": "blocks", "structured": "completion"}, "structured"),
    "ebft.stride": computed("stride", 8, "of strided mode"),
    "ebft.context_length": computed("context_length", 8, "of strided mode; the shortest prefix, there as here"),
    "ebft.generate_max_len": computed("completion_length", 8, "of strided mode"),
    "ebft.n_samples_per_prompt": computed("num_generations", 4, "of strided mode"),
    "ebft.temperature": computed("temperature", 0.6, "of strided mode; log-probs are taken at it too, theirs at 1"),
    "ebft.top_p": computed("top_p", 1.0, "of strided mode; log-probs are taken on the same support"),
    "ebft.rl_coef": computed("rl_coef", 1.0, "of strided mode"),
    "ebft.ce_coef": same("ce_coef", 0.0, "structured mode does not read it there"),
    "ebft.advantage_estimator": computed("advantage_estimator", "rloo", "of strided mode; reinforce is none"),
    "ebft.min_completion_prefix": left_out("blocks start where the completion does: its prompt is their context"),
    "ebft.feature_layers": computed("feature_layers, feature_norm", [0.25, 0.5, 0.75], "per_layer in strided mode"),
    "ebft.embed_method": computed("pooling", "last_token", "mean_pooling of what was generated, never of the prompt"),
    "ebft.use_whitening": computed("whitening, alignment", False, "paper; without it alignment: cosine, as there"),
    "ebft.alignment_coef": same("alignment_coef", 1.0),
    "ebft.diversity_coef": computed(
        "diversity_coef", 1.0, "with use_whitening over num_generations: theirs is smaller"
    ),
    "ebft.adaptive_max_tokens": left_out("completions end at their EOS, or at max_completion_length"),
    "ebft.gt_length_multiplier": left_out("of adaptive_max_tokens"),
    # trl: structured mode
    "trl.num_generations": computed("num_generations", 4, "of structured mode"),
    "trl.max_completion_length": computed("max_completion_length", 256, "of structured mode"),
    "trl.temperature": computed("temperature", 1.0, "of structured mode"),
    "trl.top_p": computed("top_p", None, "of structured mode"),
    "trl.top_k": computed("top_k", None, "of structured mode"),
    "trl.beta": same("beta"),
    "trl.scale_rewards": computed("advantage_estimator", True, "of structured mode: true is group_norm, false rloo"),
    "trl.use_vllm": computed("use_vllm", False, "of structured mode"),
    "trl.vllm_mode": computed("vllm_mode", None, "of structured mode"),
    "trl.vllm_server_host": computed("vllm_server_base_url"),
    "trl.vllm_server_port": computed("vllm_server_base_url"),
    "trl.vllm_gpu_memory_utilization": computed("vllm_gpu_memory_utilization", None, "of vllm_mode: colocate"),
    "trl.generation_kwargs": computed("stop_token_ids", None, "stop_token_ids alone"),
    "trl.chat_template_kwargs": left_out("a column `chat_template_kwargs` of the data (docs/data.md)"),
    "trl.min_p": refused_unless((None,), "top_p and top_k are the filters: " + REMOVE),
    "trl.repetition_penalty": refused_unless((None, 1.0), "it would make rollouts off-policy: " + REMOVE),
    "trl.num_iterations": refused_unless(
        (None, 1), "a second pass over the same rollouts would be off-policy: " + REMOVE
    ),
    "trl.sync_ref_model": refused_unless((None, False), "the reference is the initial policy: " + REMOVE),
    "trl.reward_funcs": refused_unless((None, []), "`ebft train --method rlvr` has rewards: " + REMOVE),
    **dict.fromkeys(("trl.loss_type", "trl.epsilon", "trl.epsilon_high"), ON_POLICY),
    **dict.fromkeys(("trl.vllm_lora_sync", "trl.vllm_sync_interval", "trl.vllm_server_timeout"), SERVER),
    **dict.fromkeys(("trl.use_data_producer", "trl.async_prefetch", "trl.streaming_partial_batch"), SERVER),
    **dict.fromkeys(("trl.skip_zero_advantage_batches", "trl.log_completions", "trl.reward_weights"), SERVER),
    **dict.fromkeys(("trl.ref_model_mixup_alpha", "trl.ref_model_sync_steps"), SERVER),
    "vllm": SERVER,
    # model and adapter
    "base_model": same("model_name_or_path"),
    "revision_of_model": same("model_revision"),
    "trust_remote_code": computed("model_init_kwargs", None, "true: `{trust_remote_code: true}`"),
    "adapter": computed("use_peft", None, "lora; qlora is load_in_4bit too"),
    "lora_r": computed("lora_r", 8),
    "lora_alpha": computed("lora_alpha", 16),
    "lora_target_modules": computed("lora_target_modules"),
    "lora_target_linear": computed("lora_target_modules", None, "all-linear"),
    "lora_modules_to_save": computed("lora_modules_to_save"),
    "peft_use_dora": computed("use_dora"),
    "peft_use_rslora": computed("use_rslora"),
    "load_in_4bit": computed("load_in_4bit"),
    "load_in_8bit": computed("load_in_8bit"),
    "lora_dropout": left_out("dropout would make the update off-policy"),
    **dict.fromkeys(("special_tokens", "chat_template", "tokenizer_type", "model_type"), TOKENIZER),
    "tokenizer_config": refused_unless((None,), "the tokenizer is the model's: save them together, and remove it"),
    # data
    "datasets": computed(
        "dataset_name, dataset_config, dataset_train_split",
        None,
        "one; its `type` is left out: columns as in docs/data.md",
    ),
    "test_datasets": computed("eval_dataset_name, dataset_test_split", None, "one"),
    "val_set_size": computed("eval_split_size", 0),
    "sequence_len": same("max_length", 512),
    "sample_packing": same("packing", False),
    "train_on_inputs": mapped(
        "completion_only_loss", {False: None, True: False}, None, "false is where there is a prompt"
    ),
    "dataset_num_proc": same("dataset_num_proc"),
    "dataset_processes": same("dataset_num_proc"),
    **dict.fromkeys(("dataset_prepared_path", "skip_prepare_dataset", "dataset_keep_in_memory"), NO_FILES),
    **dict.fromkeys(("pad_to_sequence_len", "eval_sample_packing", "shuffle_merged_datasets"), NO_FILES),
    "pretraining_dataset": refused_unless(
        (None,), "dataset_streaming: true, with dataset_name in our YAML: " + REMOVE
    ),
    # optimisation
    "micro_batch_size": computed(BATCH, 1, "documents in strided mode; completions, as theirs, in structured mode"),
    "gradient_accumulation_steps": computed(BATCH, 1),
    "batch_size": refused_unless((None,), "micro_batch_size and gradient_accumulation_steps say it: " + REMOVE),
    "eval_batch_size": same("per_device_eval_batch_size"),
    "num_epochs": same("num_train_epochs", 1),
    "max_steps": same("max_steps"),
    "learning_rate": same("learning_rate"),
    "optimizer": same("optim", "adamw_torch_fused"),
    "optim_args": same("optim_args"),
    "lr_scheduler": same("lr_scheduler_type", "cosine"),
    "lr_scheduler_kwargs": same("lr_scheduler_kwargs"),
    "warmup_steps": same("warmup_steps"),
    "warmup_ratio": same("warmup_steps", None, "below 1 a share of all steps"),
    "weight_decay": same("weight_decay", 0.0),
    "adam_beta1": same("adam_beta1", 0.9),
    "adam_beta2": same("adam_beta2", 0.999),
    "adam_epsilon": same("adam_epsilon"),
    "max_grad_norm": same("max_grad_norm"),
    "seed": same("seed"),
    **dict.fromkeys(
        ("cosine_min_lr_ratio", "cosine_constant_lr_ratio"),
        refused_unless(
            (None,), "lr_scheduler_type: cosine_with_min_lr with lr_scheduler_kwargs in our YAML: " + REMOVE
        ),
    ),
    "neftune_noise_alpha": refused_unless((None, 0), "noise would make rollouts off-policy: " + REMOVE),
    "group_by_length": left_out("documents come in random order, so that a resume is exact"),
    "auto_find_batch_size": left_out("`ebft plan` says what fits"),
    "strict": left_out("an unknown option is always refused"),
    # speed and memory
    "bf16": mapped(
        "bf16", {True: True, False: False, "auto": None, "full": True}, None, "autocast over float32 weights"
    ),
    "fp16": refused_unless((None, False), "float16 is not supported: set bf16, and remove it"),
    "tf32": same("tf32"),
    "gradient_checkpointing": mapped(
        "gradient_checkpointing",
        {True: True, False: False, "offload": True},
        None,
        "offload: activation_offloading, too",
    ),
    "gradient_checkpointing_kwargs": same("gradient_checkpointing_kwargs"),
    "torch_compile": mapped("torch_compile", {True: True, False: False, "auto": None}, None, "of norms and MLPs"),
    "torch_compile_backend": computed("torch_compile_backend", None, WHERE_COMPILED),
    "torch_compile_mode": computed("torch_compile_mode", None, WHERE_COMPILED),
    "activation_offloading": mapped(
        "activation_offloading",
        {True: True, False: False, "legacy": True},
        None,
        "of what gradient_checkpointing keeps",
    ),
    **dict.fromkeys(("flash_attention", "flex_attention", "sdp_attention", "xformers_attention"), ATTENTION),
    **dict.fromkeys(("eager_attention", "s2_attention", "attn_implementation"), ATTENTION),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), SHARDING),
    "dataloader_num_workers": same("dataloader_num_workers"),
    "dataloader_pin_memory": same("dataloader_pin_memory"),
    "dataloader_prefetch_factor": same("dataloader_prefetch_factor"),
    # what is written
    "output_dir": same("output_dir", "./model-out"),
    "logging_steps": same("logging_steps"),
    "save_steps": same("save_steps"),
    "save_strategy": same("save_strategy"),
    "save_total_limit": same("save_total_limit"),
    "eval_steps": same("eval_steps"),
    "eval_strategy": same("eval_strategy"),
    "load_best_model_at_end": same("load_best_model_at_end"),
    "metric_for_best_model": same("metric_for_best_model"),
    "greater_is_better": same("greater_is_better"),
    "early_stopping_patience": same("early_stopping_patience"),
    "resume_from_checkpoint": same("resume_from_checkpoint"),
    "hub_model_id": computed("hub_model_id, push_to_hub"),
    "hub_strategy": same("hub_strategy"),
    "use_wandb": computed("report_to"),
    "wandb_name": computed("run_name, report_to", None, "wandb"),
    "wandb_project": computed("report_to", None, "wandb; the project itself is WANDB_PROJECT in the environment"),
    "use_tensorboard": computed("report_to", None, "tensorboard"),
    **dict.fromkeys(("wandb_entity", "wandb_mode", "wandb_watch", "wandb_run_id", "wandb_log_model"), ENVIRONMENT),
}

# Of an entry of `datasets`; its transform (`type`) and the kind of its file are left out.
OF_A_DATASET = ("path", "data_files", "name", "split", "train_on_split", "type", "ds_type")
LORA = ("lora_r", "lora_alpha", "lora_modules_to_save")
OF_STRIDED = {
    "ebft.stride": "stride",
    "ebft.context_length": "context_length",
    "ebft.generate_max_len": "completion_length",
    "ebft.n_samples_per_prompt": "num_generations",
    "ebft.temperature": "temperature",
    "ebft.top_p": "top_p",
    "ebft.rl_coef": "rl_coef",
}
OF_STRUCTURED = {
    "trl.num_generations": "num_generations",
    "trl.max_completion_length": "max_completion_length",
    "trl.temperature": "temperature",
    "trl.top_p": "top_p",
    "trl.top_k": "top_k",
}


def read(text: str) -> Options:
    """The keys of a YAML file of theirs; those below `ebft` and `trl` as `ebft.stride`.

    Raises:
        ValueError: It is none.
    """
    given = yaml.safe_load(text)
    if not isinstance(given, dict):
        raise ValueError("no `name: value` lines")
    flat: Options = {}
    for name, value in given.items():
        if name in ("ebft", "trl") and isinstance(value, dict):
            flat |= {f"{name}.{inner}": scalar(setting) for inner, setting in value.items()}
        else:
            flat[name] = scalar(value)
    return {name: value for name, value in flat.items() if value is not None}


def translate(given: Options) -> tuple[Options, list[str]]:
    """Our options, and what to know of theirs.

    Raises:
        ValueError: A key is unknown, or has no counterpart.
    """
    ours, notes, keys = convert(TABLE, given)
    strided = keys["ebft.mode"] == "strided"
    named = OF_STRIDED if strided else OF_STRUCTURED
    ours |= {to: keys[name] for name, to in named.items() if keys[name] is not None}
    ours |= _rewards(keys, ours["num_generations"], strided) | (_strided(keys) if strided else _structured(keys))
    ours |= _batch(keys, ours["num_generations"], strided) | _data(keys) | _adapter(keys) | _faster(keys)
    ours |= _written(keys)
    return {name: value for name, value in ours.items() if value is not None}, notes


def _rewards(keys: Options, generations: int, strided: bool) -> Options:
    whitens, pooling = bool(keys["ebft.use_whitening"]), keys["ebft.embed_method"]
    if pooling not in ("last_token", "mean_pooling"):
        raise ValueError(
            f"ebft.embed_method={pooling!r} has no counterpart: theirs "
            + ("takes the last token" if strided else "reads the prompt, or fails")
            + "; use last_token, or mean_pooling"
        )
    norm = "per_layer" if strided else "none" if whitens else "joint"
    ours: Options = {"feature_layers": [f"{layer:g}" for layer in keys["ebft.feature_layers"]], "feature_norm": norm}
    ours |= {"pooling": pooling, "whitening": "paper" if whitens else "none"}
    # Of rollouts that are all different it is 0 with whitening; of equal ones the paper's is larger by their number.
    ours["diversity_coef"] = keys["ebft.diversity_coef"] / (generations if whitens else 1)
    return ours | ({} if whitens else {"alignment": "cosine"})


def _strided(keys: Options) -> Options:
    name = keys["ebft.advantage_estimator"]
    names = {"rloo": "rloo", "group_norm": "group_norm", "reinforce": "none"}
    if name not in names:
        raise ValueError(f"ebft.advantage_estimator={name!r} has no counterpart; those with one: {', '.join(names)}")
    return {"advantage_estimator": names[name]}


def _structured(keys: Options) -> Options:
    ours: Options = {"advantage_estimator": "group_norm" if keys["trl.scale_rewards"] else "rloo"}
    extra = dict(keys["trl.generation_kwargs"] or {})
    stops = extra.pop("stop_token_ids", None)
    if extra:
        raise ValueError(f"trl.generation_kwargs: {', '.join(extra)} has no counterpart; stop_token_ids has")
    ours |= {} if stops is None else {"stop_token_ids": stops}
    if not keys["trl.use_vllm"]:
        return ours
    mode = keys["trl.vllm_mode"] or "server"
    ours |= {"use_vllm": True, "vllm_mode": mode}
    if mode == "colocate":
        return ours | {"vllm_gpu_memory_utilization": keys["trl.vllm_gpu_memory_utilization"]}
    host, port = keys["trl.vllm_server_host"] or "0.0.0.0", keys["trl.vllm_server_port"] or 8000
    return ours | {"vllm_server_base_url": f"http://{host}:{port}"}


def _batch(keys: Options, generations: int, strided: bool) -> Options:
    micro, steps = keys["micro_batch_size"], keys["gradient_accumulation_steps"]
    if strided:
        return split_batch(micro * steps, micro, 1)
    if micro * steps % generations:
        raise ValueError(
            f"micro_batch_size={micro} times gradient_accumulation_steps={steps} completions are no whole groups of "
            f"num_generations={generations}: change one of the three"
        )
    return split_batch(micro * steps // generations, max(1, micro // generations), 1)


def _check_entry(name: str, entry: Any) -> None:
    """A dataset that can be named by one path, with nothing done to it but what docs/data.md says."""
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"{name}: give one entry with `path`, as Axolotl takes it")
    if not isinstance(entry.get("data_files"), (str, NoneType)):
        raise ValueError(f"{name}: data_files={entry['data_files']!r} are several: join them in one, or in a folder")
    unknown = [key for key in entry if key not in OF_A_DATASET]
    if unknown:
        raise ValueError(f"{name}: {unknown[0]} has no counterpart: give columns as in docs/data.md, and remove it")


def _data(keys: Options) -> Options:
    ours: Options = {}
    for name, dataset, split in (
        ("datasets", "dataset_name", "dataset_train_split"),
        ("test_datasets", "eval_dataset_name", "dataset_test_split"),
    ):
        listed = keys[name] or []
        listed = listed if isinstance(listed, list) else [listed]
        if len(listed) > 1:
            raise ValueError(f"{name}: {len(listed)} datasets; join them in one, in the shares that are wanted")
        for entry in listed:
            _check_entry(name, entry)
            config = {"dataset_config": entry.get("name")} if name == "datasets" else {}
            found = entry["path"] if entry.get("data_files") is None else entry["data_files"]
            ours |= {dataset: found, split: entry.get("split") or entry.get("train_on_split"), **config}
    return ours | ({"eval_split_size": keys["val_set_size"]} if keys["val_set_size"] else {})


def _adapter(keys: Options) -> Options:
    adapter = keys["adapter"]
    ours: Options = {name: True for name in ("load_in_4bit", "load_in_8bit") if keys[name]}
    if adapter is None:
        return ours
    if adapter not in ("lora", "qlora"):
        raise ValueError(f"adapter={adapter!r} has no counterpart; lora and qlora have")
    ours |= {"load_in_4bit": True} if adapter == "qlora" else {}
    modules = "all-linear" if keys["lora_target_linear"] else keys["lora_target_modules"]
    ours |= {"use_peft": True, "lora_target_modules": modules} | {name: keys[name] for name in LORA}
    return ours | {
        to: True for name, to in (("peft_use_dora", "use_dora"), ("peft_use_rslora", "use_rslora")) if keys[name]
    }


def _faster(keys: Options) -> Options:
    compiles = ("torch_compile_backend", "torch_compile_mode") if keys["torch_compile"] is True else ()
    offloads = {"activation_offloading": True} if keys["gradient_checkpointing"] == "offload" else {}
    return {name: keys[name] for name in compiles} | offloads


def _written(keys: Options) -> Options:
    loggers = ["wandb"] * any(keys[name] for name in ("use_wandb", "wandb_name", "wandb_project"))
    loggers += ["tensorboard"] * bool(keys["use_tensorboard"])
    ours: Options = {"report_to": loggers} if loggers else {}
    ours |= {"run_name": keys["wandb_name"]} if keys["wandb_name"] else {}
    ours |= {"hub_model_id": keys["hub_model_id"], "push_to_hub": True} if keys["hub_model_id"] else {}
    ours |= {"model_init_kwargs": {"trust_remote_code": True}} if keys["trust_remote_code"] else {}
    return ours
