"""`ebft convert`: settings of the authors' release and of Axolotl become ours, or are refused with what to do."""

import re
from pathlib import Path

import pytest
import yaml

from ebft.cli import main
from ebft.cli.arguments import parse
from ebft.cli.convert import converted
from ebft.config import EBFTConfig
from ebft.migration import authors, axolotl
from ebft.migration.rules import markdown

ROOT = Path(__file__).resolve().parents[1]

# The paper's Q&A coding as flags of the release.
AUTHORS = {
    **{"pretrain": "Qwen/Qwen2.5-1.5B", "critic_pretrain": "Qwen/Qwen2.5-1.5B", "prompt_data": "some/data"},
    **{"input_key": "question", "label_key": "answer", "output_key": "answer", "max_samples": -1, "bf16": True},
    **{"rollout_batch_size": 16, "train_batch_size": 64, "micro_train_batch_size": 8, "actor_num_gpus_per_node": 1},
    **{"prompt_max_len": 1024, "context_max_len": 8, "generate_max_len": 8, "stride": 8, "n_samples_per_prompt": 4},
    **{"temperature": 0.6, "hidden_state_method": "concat", "embed_method": "last_token", "use_whitening": True},
    **{"advantage_estimator": "rloo", "init_kl_coef": 0.0, "use_kl_loss": True, "kl_estimator": "k2"},
    **{"rl_loss_coef": 1.0, "ce_loss_coef": 0.03, "lr_scheduler": "constant_with_warmup", "num_episodes": 2},
    **{"critic_learning_rate": 0.0, "critic_lr_head": 0.0, "actor_learning_rate": "1e-6", "zero_stage": 2},
    **{"use_wandb": "0123456789", "eval_steps": 100, "eval_dataset": "some/data", "eval_split": "test"},
}
STRIDED = {
    "base_model": "meta-llama/Llama-3.2-1B",
    "rl": "ebft",
    "ebft": {"mode": "strided", "stride": 4, "use_whitening": True, "ce_coef": 0.03, "n_samples_per_prompt": 4},
    "datasets": [{"path": "some/data", "type": "ebft_pretrain.transform", "split": "train[:100]"}],
    **{"sequence_len": 256, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5},
    **{"learning_rate": "1.0e-6", "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    **{"lora_target_linear": True, "bf16": "auto", "flash_attention": False, "val_set_size": 0.0, "warmup_steps": 2},
    **{"special_tokens": {"pad_token": "<|end_of_text|>"}, "output_dir": "out", "save_steps": 100},
}
STRUCTURED = STRIDED | {
    "ebft": {"embed_method": "last_token"},
    "trl": {
        **{"num_generations": 4, "max_completion_length": 128, "temperature": 0.7, "scale_rewards": True},
        **{"loss_type": "grpo", "epsilon": 0.2, "generation_kwargs": {"stop_token_ids": [1, 2]}},
    },
    "vllm": {"max_model_len": 1024},
    "micro_batch_size": 4,
}


@pytest.fixture
def convert(tmp_path):
    """Converts settings, by the command's own function, and returns our options after our own parser took them."""

    def run(source: str, settings: dict | str, sweep: int | None = None) -> tuple[dict, str]:
        path = tmp_path / "theirs.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings, sort_keys=False))
        text = converted(source, path, sweep)
        (tmp_path / "ours.yaml").write_text(text)
        options = yaml.safe_load(text)
        parse(["--config", str(tmp_path / "ours.yaml"), "--report_to", "none", "--use_cpu", "--bf16", "false"])
        return options, text

    return run


def test_the_papers_flags_are_the_papers_recipe(convert):
    ours, text = convert("authors", AUTHORS)
    recipe = yaml.safe_load((ROOT / "recipes" / "paper" / "qa_coding.yaml").read_text())
    places = {"dataset_name", "eval_dataset_name", "output_dir", "save_steps"}
    assert recipe.keys() - places <= ours.keys() | {"beta"}
    assert {name: ours[name] for name in recipe.keys() - places} == {
        name: recipe[name] for name in recipe.keys() - places
    }
    assert ours["report_to"] == ["wandb"] and "0123456789" not in text
    assert ours["eval_strategy"] == "steps" and ours["dataset_test_split"] == "test"
    assert "# zero_stage: Ray, vLLM and DeepSpeed placed" in text
    assert "num_processes" not in ours and "feature_model_name_or_path" not in ours


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_whitening": False}, {"whitening": "none", "alignment": "cosine"}),
        ({"critic_pretrain": "other"}, {"feature_model_name_or_path": "other"}),
        ({"hidden_state_method": "layer_5"}, {"feature_layers": ["5"]}),
        ({"hidden_state_method": "concat_layers_5_6"}, {"feature_layers": ["5", "6"]}),
        ({"hidden_state_method": "last_only"}, {"feature_layers": ["1.0"]}),
        ({"qa_masking": True}, {"completion_only_loss": True, "anchors": "completion"}),
        ({"stride": None}, {"stride": 8}),
        ({"init_kl_coef": 0.1}, {"beta": 0.1, "kl_estimator": "k2"}),
        ({"lora_rank": 8}, {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"}),
        (
            {"actor_num_gpus_per_node": 2},
            {"num_processes": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ({"actor_lr_warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"advantage_estimator": "reinforce"}, {"advantage_estimator": "none"}),
    ],
)
def test_single_flags(convert, changes, expected):
    ours, _ = convert("authors", AUTHORS | changes)
    assert {name: ours.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"critic_learning_rate": 1e-6},
            r"critic_learning_rate=1e-06 has no counterpart: the feature network is frozen",
        ),
        ({"critic_learning_rate": "drop"}, r"critic_learning_rate=9e-06 \(their default\) has no counterpart"),
        ({"advantage_estimator": "gae"}, "advantage_estimator='gae' has no counterpart; those with one: rloo"),
        ({"hidden_state_method": "mean"}, "hidden_state_method='mean' has no counterpart: .*feature_reduction: mean"),
        ({"hidden_state_method": "stack"}, "hidden_state_method='stack' .* feature_norm: per_layer"),
        ({"train_batch_size": 32}, r"train_batch_size=32: .* n_samples_per_prompt = 64"),
        ({"max_epochs": 2}, "max_epochs=2 has no counterpart: a second pass"),
        ({"max_samples": 500}, r"write dataset_train_split: train\[:N\]"),
        ({"init_kl_coef": 0.1, "kl_estimator": "k1"}, "init_kl_coef=0.1 has a counterpart only with use_kl_loss"),
        ({"strid": 8}, "strid: no setting that is known there; did you mean stride?"),
        (
            {"rollout_batch_size": 15, "train_batch_size": 60},
            "15 documents per update cannot be divided over 1 device",
        ),
    ],
)
def test_flags_without_a_counterpart(convert, changes, message):
    settings = {name: value for name, value in (AUTHORS | changes).items() if value != "drop"}
    with pytest.raises(ValueError, match=message):
        convert("authors", settings)


def test_a_shell_script_and_a_sweep(convert):
    words = " \\\n  ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in AUTHORS.items())
    script = f"ray job submit -- python3 -m openrlhf.cli.train_ebft_ray \\\n  {words} \\\n  --adam_betas 0.9 0.95\n"
    expected, _ = convert("authors", AUTHORS)
    assert convert("authors", script)[0] == expected
    after = "# calls openrlhf.cli.train_ebft_ray\n{}--bf16 2>&1 | tee log  # all of it\necho done\n"
    assert convert("authors", after.format(script.removesuffix("\n") + " "))[0] == expected
    with pytest.raises(ValueError, match="\\$MODEL is a variable of the shell: write its value there"):
        convert("authors", "python -m openrlhf.cli.train_ebft_ray --pretrain $MODEL\n")
    sweep = [{"ce_loss_coef": [0.0, 0.1], "diversity_rew_coef": [0.5, 1.0]}, {"ce_loss_coef": [0.3]}]
    settings = AUTHORS | {"sweep": sweep, "eval_temperature": "${temperature}"}
    with pytest.raises(ValueError, match="sweep holds 5 settings: choose one with --sweep 0 to 4"):
        convert("authors", settings)
    for index, (ce, diversity) in enumerate([(0.0, 0.5), (0.0, 1.0), (0.1, 0.5), (0.1, 1.0), (0.3, 1.0)]):
        ours, _ = convert("authors", settings, index)
        assert (ours["ce_coef"], ours["diversity_coef"]) == (ce, diversity)


def test_axolotls_strided_mode(convert):
    ours, text = convert("axolotl", STRIDED)
    expected = {
        **{"model_name_or_path": "meta-llama/Llama-3.2-1B", "rollout": "blocks", "stride": 4, "context_length": 8},
        **{"completion_length": 8, "num_generations": 4, "temperature": 0.6, "advantage_estimator": "rloo"},
        **{"whitening": "paper", "diversity_coef": 0.25, "feature_norm": "per_layer", "pooling": "last_token"},
        **{"feature_layers": ["0.25", "0.5", "0.75"], "ce_coef": 0.03, "dataset_name": "some/data"},
        **{"dataset_train_split": "train[:100]", "max_length": 256, "per_device_train_batch_size": 1},
        **{"gradient_accumulation_steps": 2, "learning_rate": 1e-6, "use_peft": True, "lora_r": 16},
        **{"lora_target_modules": "all-linear", "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.0},
    }
    assert {name: ours.get(name) for name in expected} == expected
    assert "eval_split_size" not in ours and "bf16" not in ours
    named = {"path": "json", "data_files": "rows.jsonl"}
    assert convert("axolotl", STRIDED | {"datasets": [named]})[0]["dataset_name"] == "rows.jsonl"
    assert "# lora_dropout: dropout would make the update off-policy" in text


def test_axolotls_structured_mode(convert):
    ours, _ = convert("axolotl", STRUCTURED)
    expected = {
        **{"rollout": "completion", "max_completion_length": 128, "num_generations": 4, "temperature": 0.7},
        **{"advantage_estimator": "group_norm", "whitening": "none", "alignment": "cosine", "feature_norm": "joint"},
        **{"diversity_coef": 1.0, "stop_token_ids": [1, 2], "per_device_train_batch_size": 1},
        "gradient_accumulation_steps": 2,
    }
    assert {name: ours.get(name) for name in expected} == expected
    assert "stride" not in ours and "use_vllm" not in ours


BACKEND = {"torch_compile_backend": "inductor"}
CHECKPOINTED = {"gradient_checkpointing": True}
OFFLOADED = CHECKPOINTED | {"activation_offloading": True}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"torch_compile": True} | BACKEND, {"torch_compile": True} | BACKEND),
        ({"torch_compile": False} | BACKEND, {"torch_compile": False}),
        (BACKEND | {"torch_compile_mode": "default"}, {}),
        (CHECKPOINTED, CHECKPOINTED),
        (CHECKPOINTED | {"activation_offloading": "legacy"}, OFFLOADED),
        ({"gradient_checkpointing": "offload"}, OFFLOADED),
    ],
)
def test_axolotls_memory_and_speed(convert, theirs, expected):
    ours, _ = convert("axolotl", STRIDED | theirs)
    assert {name: ours[name] for name in ours if name.startswith(("torch_c", "gradient_ch", "activ"))} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_offloading": "disk"}, "activation_offloading='disk' has no counterpart"),
        ({"rl": "grpo"}, "rl='grpo' has no counterpart: only `rl: ebft`"),
        ({"ebft": {"mode": "strided", "embed_method": "concat"}}, "ebft.embed_method='concat' has no counterpart"),
        ({"ebft": {"strides": 8}}, "ebft.strides: no setting that is known there; did you mean ebft.stride?"),
        ({"datasets": [{"path": "a"}, {"path": "b"}]}, "datasets: 2 datasets; join them"),
        ({"datasets": "rows.jsonl"}, "datasets: give one entry with `path`"),
        ({"datasets": [{"paht": "a"}]}, "datasets: give one entry with `path`"),
        ({"datasets": [{"path": "a", "shards": 4}]}, "datasets: shards has no counterpart"),
        ({"datasets": [{"path": "json", "data_files": ["a", "b"]}]}, "datasets: data_files=.* are several"),
        ({"bf16": [1]}, r"bf16=\[1\] has no counterpart"),
        ({"micro_batch_size": "one"}, "micro_batch_size='one' should be of the kind of 1, their default"),
        ({"sample_packing": "yes please"}, "sample_packing='yes please' should be of the kind of False"),
        ({"ebft": {"feature_layers": "half"}}, "ebft.feature_layers='half' should be of the kind of"),
        ({"fsdp_config": {"fsdp_version": 2}}, "fsdp_config=.* has no counterpart: several GPUs are accelerate's"),
        ({"adapter": "llama-adapter"}, "adapter='llama-adapter' has no counterpart; lora and qlora"),
        ({"adamw_learning": 1}, "adamw_learning: no setting that is known there"),
    ],
)
def test_keys_without_a_counterpart(convert, changes, message):
    with pytest.raises(ValueError, match=message):
        convert("axolotl", STRIDED | changes)


def test_structured_batches_are_whole_groups(convert):
    with pytest.raises(ValueError, match="are no whole groups of num_generations=4"):
        convert("axolotl", STRUCTURED | {"micro_batch_size": 3, "gradient_accumulation_steps": 1})


def test_the_command(tmp_path, capsys):
    path, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(STRIDED))
    assert main(["convert", "axolotl", str(path)]) == 0
    printed = capsys.readouterr().out
    assert main(["convert", "axolotl", str(path), "--output_file", str(out)]) == 0
    assert out.read_text() == printed
    for words in (["axolotl", "nowhere.yaml"], ["trl", str(path)], ["axolotl", str(path), "--sweep", "1"]):
        assert main(["convert", *words]) == 2
    path.write_text(f"rl: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    assert main(["convert", "axolotl", str(path)]) == 2
    assert not (tmp_path / "mark").exists()
    path.write_text("use_wandb: [0123456789\n")
    capsys.readouterr()
    assert main(["convert", "authors", str(path)]) == 2
    said = capsys.readouterr().err
    assert "theirs.yaml:2: not valid YAML" in said and "0123456789" not in said


@pytest.mark.parametrize("module", [authors, axolotl])
def test_documents_have_the_tables(module):
    """Print them with `python -m ebft.migration`."""
    assert markdown(module.TABLE) in (ROOT / "docs" / "migration.md").read_text()


@pytest.mark.parametrize("module", [authors, axolotl])
def test_every_counterpart_is_an_option_of_ours(module):
    known = set(vars(parse(["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu"]).data))
    arguments = parse(["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu"])
    known |= {name for group in arguments[1:4] for name in vars(group)} | set(EBFTConfig.__dataclass_fields__)
    named = {name for rule in module.TABLE.values() for name in re.split(", ", rule.to) if name}
    assert named <= known
