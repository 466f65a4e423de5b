"""The flags of the authors' release: github.com/sjelassi/ebft_openrlhf, openrlhf/cli/train_ebft_ray.py."""

import re
import shlex
from itertools import product, takewhile
from typing import Any

import yaml

from .rules import Options, Rule, computed, convert, left_out, mapped, refused_unless, same, split_batch

ONE_PROGRAM = left_out("Ray, vLLM and DeepSpeed placed its many processes; here one process trains, or accelerate's")
MEMORY = left_out("where memory is short: gradient_checkpointing, a smaller per_device_train_batch_size, LoRA")
ON_POLICY = left_out("one update per batch of rollouts: the ratio is 1 and nothing is clipped")
NO_CRITIC = left_out("of the learned critic; the feature network is frozen")
MEASURED_LATER = left_out("`ebft evaluate` measures generations, after the training")
CHECKPOINTS = left_out("checkpoints are those of transformers, every save_steps updates")
REWARD_MODELS = refused_unless((None,), "rewards are features alone: remove it")
# What ends the words of a command in a shell script: a pipe, a redirection, another command.
END_OF_COMMAND = re.compile(r"\d*>|(\|\|?|&&?|;)$")
BATCH = "per_device_train_batch_size, gradient_accumulation_steps"

TABLE: dict[str, Rule] = {
    # models
    "pretrain": same("model_name_or_path"),
    "critic_pretrain": computed("feature_model_name_or_path", None, "left out where it is the model itself"),
    "bf16": same("bf16", False, "autocast over float32 weights, where theirs are bfloat16"),
    "gradient_checkpointing": same("gradient_checkpointing", False),
    "use_liger_kernel": same("use_liger_kernel", False),
    "load_in_4bit": computed("load_in_4bit", False),
    "lora_rank": computed("use_peft, lora_r", 0),
    "lora_alpha": computed("lora_alpha", 16),
    "target_modules": computed("lora_target_modules", "all-linear"),
    "lora_dropout": left_out("dropout would make the update off-policy"),
    "pretrain_mode": left_out("documents are always trained on whole"),
    "disable_fast_tokenizer": refused_unless((False, None), "tokenizers are fast ones: remove it"),
    # blocks and rollouts
    "prompt_max_len": same("max_length", 1024),
    "context_max_len": same("context_length", 1024),
    "generate_max_len": same("completion_length", 1024),
    "stride": computed("stride", None, "generate_max_len where it is not given"),
    "n_samples_per_prompt": same("num_generations", 1),
    "temperature": same("temperature", 1.0),
    "top_p": same("top_p", 1.0, "log-probs are taken on the same support; theirs are not"),
    "seed": same("seed", 42, "other random numbers than there"),
    "full_determinism": same("full_determinism", False),
    # features and rewards
    "hidden_state_method": computed(
        "feature_layers", "last_only", "last_only, concat, layer_N and concat_layers_N_M; the others are refused"
    ),
    "embed_method": mapped(
        "pooling",
        {name: name for name in ("last_token", "mean_pooling", "concat", "token")},
        "concat",
        "with token, a token receives the rewards from its own on, where theirs receives its own alone",
    ),
    "use_whitening": computed("whitening, alignment", False, "released; without it alignment: cosine, as there"),
    "alignment_rew_coef": same("alignment_coef", 1.0),
    "diversity_rew_coef": same("diversity_coef", 1.0),
    "advantage_estimator": mapped(
        "advantage_estimator",
        {"rloo": "leave_one_out", "group_norm": "group_norm", "reinforce": "none"},
        "gae",
        "their rloo recomputes the rewards without the sample: the exact baseline",
    ),
    "no_advantage_std_norm": left_out("only group_norm divides by a standard deviation"),
    "reward_pretrain": left_out("a second model, which the rewards of their training do not read"),
    "remote_rm_url": REWARD_MODELS,
    "agent_func_path": REWARD_MODELS,
    "normalize_reward": refused_unless((False, None), "rewards are not normalised: remove it"),
    "reward_clip_range": left_out("rewards of features of length 1 are within it"),
    "dynamic_filtering": refused_unless((False, None), "no context is left out by its reward: remove it"),
    # objective
    "rl_loss_coef": same("rl_coef", 1.0),
    "rl_loss_warmup_steps": left_out("theirs acts only together with rl_loss_warmup_start"),
    "rl_loss_warmup_start": refused_unless(
        (None, 0), "rl_coef rises from the first step on: remove it, and set rl_warmup_steps in our YAML"
    ),
    "ce_loss_coef": same("ce_coef", 0.01),
    "ce_loss_decay_steps": refused_unless(
        (None,), "ce_decay: linear decays over the whole run: remove it and set that in our YAML"
    ),
    "init_kl_coef": same("beta", 0.01),
    "use_kl_loss": computed("kl_estimator", False, "of init_kl_coef"),
    "kl_estimator": computed("kl_estimator", "k1", "of init_kl_coef; k2 and k3, in the loss"),
    "kl_loss_coef": refused_unless((None,), "init_kl_coef alone weighs the divergence: remove it"),
    "kl_loss_decay_steps": left_out("of kl_loss_coef"),
    "entropy_loss_coef": refused_unless(
        (None, 0), "there is no entropy bonus, and entropy is always logged: remove it"
    ),
    "aux_loss_coef": refused_unless((None, 0), "there is no balancing loss of routers: set it to 0"),
    **dict.fromkeys(("policy_loss_type", "eps_clip", "eps_clip_low_high", "dual_clip", "value_clip"), ON_POLICY),
    **dict.fromkeys(("lambd", "gamma"), ON_POLICY),
    "max_epochs": refused_unless((1,), "a second pass over the same rollouts would be off-policy: set it to 1", 1),
    # optimisation
    "actor_learning_rate": same("learning_rate", 1e-6),
    "lr_scheduler": computed("lr_scheduler_type", "cosine_with_min_lr", "the least rate is a tenth, as there"),
    "lr_warmup_ratio": same("warmup_steps", 0.03, "below 1 a share of all steps"),
    "actor_lr_warmup_ratio": computed("warmup_steps"),
    "adam_betas": computed("adam_beta1, adam_beta2", (0.9, 0.95)),
    "max_norm": same("max_grad_norm", 1.0),
    "l2": same("weight_decay", 0.0),
    # the learned critic
    "critic_learning_rate": refused_unless((0,), "the feature network is frozen: set it to 0", 9e-6),
    "critic_lr_head": refused_unless((0, None), "there is no classifier on the features: set it to 0"),
    **dict.fromkeys(("critic_lr_scheduler", "critic_lr_warmup_ratio", "critic_classifier_loss_coef"), NO_CRITIC),
    **dict.fromkeys(("critic_sequence_level", "classifier_sequence_selection", "save_value_network"), NO_CRITIC),
    **dict.fromkeys(("enable_ema", "ema_beta", "value_head_prefix", "load_critic_checkpoint"), NO_CRITIC),
    # batches
    "num_episodes": same("num_train_epochs", 1),
    "rollout_batch_size": computed(BATCH, 1024, "documents per update"),
    "train_batch_size": computed(BATCH, 128, "must be rollout_batch_size times n_samples_per_prompt, as there"),
    "micro_train_batch_size": computed(BATCH, 4, "theirs counts rollouts, ours documents"),
    "actor_num_nodes": computed("num_processes", 1, "only the actor's devices: the others have no work here"),
    "actor_num_gpus_per_node": computed("num_processes", 8),
    "micro_rollout_batch_size": left_out("per_device_generation_batch_size is chosen by itself"),
    # data
    "prompt_data": same("dataset_name"),
    "prompt_split": same("dataset_train_split", "train"),
    "eval_dataset": computed("eval_dataset_name", None, "where eval_steps is above 0"),
    "eval_split": computed("dataset_test_split", "train"),
    "eval_steps": computed("eval_strategy, eval_steps", -1),
    "input_key": left_out("the column must be called `prompt`, or `text` where there is no label"),
    "label_key": computed("completion_only_loss, anchors", None, "the column must be called `completion`"),
    "output_key": left_out("their training reads label_key"),
    "document_masking": same("document_masking", False, "with packing: true, as always there"),
    "qa_masking": computed("completion_only_loss, anchors", False, "false: loss and blocks in questions too"),
    "max_samples": refused_unless((-1, 1e8), "write dataset_train_split: train[:N] in our YAML and set it to -1", 1e8),
    "prompt_data_probs": refused_unless((None,), "one dataset: join them in one file, in these shares"),
    "input_template": refused_unless((None,), "prompts are taken as they are: put it into the data"),
    "apply_chat_template": refused_unless((False, None), "give prompt and completion as messages, and remove it"),
    "no_chat_template": left_out("text has no template; messages have the tokenizer's"),
    # what is written
    "save_path": same("output_dir", "./ckpt"),
    "save_steps": computed("save_steps", -1, "where it is above 0; else every 500 updates"),
    "max_ckpt_num": same("save_total_limit", 3),
    **dict.fromkeys(("save_log_scale_count", "save_even_count", "ckpt_path", "save_hf_ckpt"), CHECKPOINTS),
    **dict.fromkeys(("disable_ds_ckpt", "max_ckpt_mem", "use_ds_universal_ckpt"), CHECKPOINTS),
    "load_actor_checkpoint": refused_unless((False, None), "`--resume_from_checkpoint last` goes on: remove it"),
    "logging_steps": same("logging_steps", 1),
    "log_gradients": left_out("grad_norm is always logged"),
    "use_wandb": computed("report_to", None, "wandb; the key itself belongs into the environment: WANDB_API_KEY"),
    "use_tensorboard": computed("report_to", None, "tensorboard; its folder is TENSORBOARD_LOGGING_DIR"),
    "wandb_run_name": same("run_name"),
    "wandb_project": left_out("WANDB_PROJECT in the environment"),
    "wandb_org": left_out("WANDB_ENTITY in the environment"),
    "wandb_group": left_out("WANDB_RUN_GROUP in the environment"),
    # evaluation
    **dict.fromkeys(("eval_down_steps", "eval_generate_max_len", "eval_temperature"), MEASURED_LATER),
    **dict.fromkeys(("eval_temperature_down", "eval_n_samples_per_prompt"), MEASURED_LATER),
    **dict.fromkeys(("eval_n_samples_per_prompt_down", "eval_batch_size", "eval_down_batch_size"), MEASURED_LATER),
    **dict.fromkeys(("eval_max_samples", "eval_down_max_samples"), MEASURED_LATER),
    # machines
    **dict.fromkeys(
        ("critic_num_nodes", "critic_num_gpus_per_node", "ref_num_nodes", "ref_num_gpus_per_node"), ONE_PROGRAM
    ),
    **dict.fromkeys(("reward_num_nodes", "reward_num_gpus_per_node", "colocate_actor_ref"), ONE_PROGRAM),
    **dict.fromkeys(("colocate_critic_reward", "colocate_reward_models", "colocate_all_models"), ONE_PROGRAM),
    **dict.fromkeys(("async_train", "ring_attn_size", "ring_head_stride", "vllm_num_engines"), ONE_PROGRAM),
    **dict.fromkeys(("vllm_tensor_parallel_size", "vllm_sync_backend", "vllm_sync_with_ray"), ONE_PROGRAM),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_enable_sleep", "enable_prefix_caching"), ONE_PROGRAM),
    **dict.fromkeys(("enforce_eager", "vllm_generate_batch_size", "local_rank", "zero_stage", "zpg"), ONE_PROGRAM),
    **dict.fromkeys(("overlap_comm", "deepcompile", "deepspeed_enable_sleep", "ds_tensor_parallel_size"), ONE_PROGRAM),
    **dict.fromkeys(("slurm_job", "use_ms", "debug"), ONE_PROGRAM),
    **dict.fromkeys(("adam_offload", "grad_accum_dtype", "gradient_checkpointing_use_reentrant"), MEMORY),
    **dict.fromkeys(("packing_samples", "use_dynamic_batch", "rollout_max_tokens_per_gpu"), MEMORY),
    **dict.fromkeys(("train_max_tokens_per_gpu", "ref_reward_offload", "flash_attn"), MEMORY),
    **dict.fromkeys(("micro_reward_batch_size", "overlong_buffer_len", "overlong_penalty_factor"), MEMORY),
    "dynamic_filtering_reward_range": left_out("of dynamic_filtering"),
}


def read(text: str, sweep: int | None = None) -> Options:
    """The flags of a YAML file of theirs, or of a shell script that calls `openrlhf.cli.train_ebft_ray`.

    Args:
        text: Of the file.
        sweep: Which setting of a `sweep`, counted as their SLURM_ARRAY_TASK_ID.

    Raises:
        ValueError: It is neither, or holds several settings and `sweep` does not say which.
    """
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    command = next((line.partition("train_ebft_ray")[2] for line in lines if "train_ebft_ray" in line), None)
    if command is not None:
        return _flags(_words(command))
    options = yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError("neither `name: value` lines nor a script that calls openrlhf.cli.train_ebft_ray")
    settings = [dict(zip(part, values, strict=True)) for part in options.pop("sweep", []) for values in _grid(part)]
    if len(settings) > 1 and (sweep is None or not 0 <= sweep < len(settings)):
        raise ValueError(f"sweep holds {len(settings)} settings: choose one with --sweep 0 to {len(settings) - 1}")
    options = {name: scalar(value) for name, value in (options | (settings[sweep or 0] if settings else {})).items()}
    return {name: _referred(value, options) for name, value in options.items()}


def _words(command: str) -> list[str]:
    """The words of a line of a shell script, up to the end of the command."""
    words = list(takewhile(lambda word: not END_OF_COMMAND.match(word), shlex.split(command, comments=True)))
    variable = next((word for word in words if "$" in word), None)
    if variable is not None:
        raise ValueError(f"{variable} is a variable of the shell: write its value there")
    return words


def _grid(part: Options) -> Any:
    return product(*(value if isinstance(value, list) else [value] for value in part.values()))


def _referred(value: Any, options: Options) -> Any:
    """`${name}` is the value of another flag."""
    name = value[2:-1] if isinstance(value, str) and value.startswith("${") and value.endswith("}") else None
    return options.get(name, value) if name else value


def _flags(words: list[str]) -> Options:
    options: Options = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            options[name] = scalar(value) if given else True
        elif name:
            before = options[name]
            options[name] = (
                scalar(word) if before is True else [*(before if isinstance(before, list) else [before]), scalar(word)]
            )
    return options


def scalar(value: Any) -> Any:
    """Numbers that YAML takes for text, such as 1e-6, as numbers; `None`, `null` and placeholders as None."""
    if not isinstance(value, str):
        return value
    if value in ("None", "null", "", "<INSERT>"):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)


def translate(given: Options) -> tuple[Options, list[str]]:
    """Our options, and what to know of theirs.

    Raises:
        ValueError: A flag is unknown, or has no counterpart.
    """
    ours, notes, flags = convert(TABLE, given)
    ours |= {"packing": True, "feature_norm": "joint", "loss_normalization": "document"}
    ours |= (
        _batch(flags) | _features(flags) | _divergence(flags) | _optimisation(flags) | _data(flags) | _adapter(flags)
    )
    if flags["save_steps"] > 0:
        ours["save_steps"] = flags["save_steps"]
    loggers = [name for name, flag in (("wandb", "use_wandb"), ("tensorboard", "use_tensorboard")) if flags[flag]]
    return ours | ({"report_to": loggers} if loggers else {}), notes


def _batch(flags: Options) -> Options:
    rollouts, documents = flags["n_samples_per_prompt"], flags["rollout_batch_size"]
    if flags["train_batch_size"] != rollouts * documents:
        raise ValueError(
            f"train_batch_size={flags['train_batch_size']}: their code takes none but rollout_batch_size * "
            f"n_samples_per_prompt = {documents * rollouts}; correct one of the three"
        )
    devices = flags["actor_num_nodes"] * flags["actor_num_gpus_per_node"]
    return split_batch(documents, max(1, flags["micro_train_batch_size"] // rollouts), devices)


def _features(flags: Options) -> Options:
    method = flags["hidden_state_method"]
    kind, _, numbers = method.rpartition("layers_") if "layers_" in method else method.rpartition("layer_")
    if method == "concat":
        layers = ["0.25", "0.5", "0.75"]
    elif method == "last_only":
        layers = ["1.0"]
    elif kind in ("", "concat_") and numbers.replace("_", "").isdecimal():
        layers = numbers.split("_")
    else:
        raise ValueError(
            f"hidden_state_method={method!r} has no counterpart: `mean` and `middle` are feature_layers by number "
            "with feature_reduction: mean; stacked layers are nearest to concat with feature_norm: per_layer"
        )
    ours: Options = {"feature_layers": layers, "stride": flags["stride"] or flags["generate_max_len"]}
    ours |= {"whitening": "released"} if flags["use_whitening"] else {"whitening": "none", "alignment": "cosine"}
    critic = flags["critic_pretrain"]
    return ours | ({"feature_model_name_or_path": critic} if critic and critic != flags["pretrain"] else {})


def _divergence(flags: Options) -> Options:
    if not flags["init_kl_coef"]:
        return {}
    if not flags["use_kl_loss"] or flags["kl_estimator"] == "k1":
        raise ValueError(
            f"init_kl_coef={flags['init_kl_coef']} has a counterpart only with use_kl_loss and kl_estimator k2 or k3 "
            "(in the loss the mean gradient of k1 is 0): set it to 0, and beta and kl_estimator: k1 in our YAML"
        )
    return {"kl_estimator": flags["kl_estimator"]}


def _optimisation(flags: Options) -> Options:
    ours: Options = dict(zip(("adam_beta1", "adam_beta2"), flags["adam_betas"], strict=True))
    ours["lr_scheduler_type"] = flags["lr_scheduler"]
    if flags["lr_scheduler"] == "cosine_with_min_lr":
        ours["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
    warmup = flags["actor_lr_warmup_ratio"]
    return ours | ({} if warmup is None else {"warmup_steps": warmup})


def _data(flags: Options) -> Options:
    ours: Options = {}
    if flags["label_key"]:
        answers = bool(flags["qa_masking"])
        ours |= {"completion_only_loss": answers, "anchors": "completion" if answers else "all"}
    if flags["eval_dataset"] and flags["eval_steps"] > 0:
        ours |= {
            "eval_strategy": "steps",
            "eval_steps": flags["eval_steps"],
            "dataset_test_split": flags["eval_split"],
        }
        ours |= {"eval_dataset_name": flags["eval_dataset"]} if flags["eval_dataset"] != flags["prompt_data"] else {}
    return ours


def _adapter(flags: Options) -> Options:
    ours: Options = {"load_in_4bit": True} if flags["load_in_4bit"] else {}
    if not flags["lora_rank"]:
        return ours
    ours |= {"use_peft": True, "lora_r": flags["lora_rank"], "lora_alpha": flags["lora_alpha"]}
    return ours | {"lora_target_modules": flags["target_modules"]}
