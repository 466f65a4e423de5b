"""Runs on a GPU, where there is one: the trainer, its engines, bases of few bits, resuming."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("trl")

from transformers.models.qwen2 import modeling_qwen2

import training
from ebft.cli.engines import config_path
from test_adapters import (
    adapted,
    check_features_of_few_bits,
    check_resume_on_few_bits,
    dequantised,
    lora,
    needs_bitsandbytes,
    quantised,
)
from test_trainer_step import ROWS, check_step, oracle_documents
from training import files, read_metrics, relative_error, small_model, train

ON_GPU = dict(use_cpu=False, bf16=None)  # bfloat16, as by default there


@pytest.fixture
def liger_undone():
    """Liger patches the module of the whole family."""
    before = dict(vars(modeling_qwen2))
    yield
    vars(modeling_qwen2).update(before)


@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.usefixtures("liger_undone")
def test_trainer_runs(tmp_path, liger):
    """A few updates as by default (bfloat16, a step's rollouts at once); the loss is finite, the weights move."""
    if liger:
        pytest.importorskip("liger_kernel")
    model = training.small_model(dtype=torch.float32)
    before = deepcopy(model.state_dict())
    settings = dict(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    rows = training.documents([30, 17, 40, 12, 25, 33, 38, 21])
    run = training.trainer(model, rows, tmp_path, settings=ON_GPU | settings | dict(use_liger_kernel=liger))
    assert run.args.bf16 and run.args.rows_sampled_on(run.args.device) == 4
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    assert any((before[name] != weight.cpu()).any() for name, weight in run.model.state_dict().items())


ENGINES = [("fsdp2", 1), ("offloading", 1), ("zero2", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2)]


def configuration(name: str, folder: Path) -> str:
    """A shipped one's path; or that of FSDP2 with weights and optimiser in the CPU's memory."""
    if name != "offloading":
        return str(config_path(name))
    text, path = config_path("fsdp2").read_text(), folder / "offloading.yaml"
    assert "fsdp_offload_params: false" in text
    path.write_text(text.replace("fsdp_offload_params: false", "fsdp_offload_params: true"))
    return str(path)


@pytest.mark.parametrize("case", ["full", "lora"])
@pytest.mark.parametrize(("engine", "processes"), ENGINES)
def test_engines_on_gpus_do_what_one_gpu_does(tmp_path, case, engine, processes):
    """In float32; by the shipped configurations, through `accelerate launch`."""
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")

    def weights(name: str, count: int) -> list[dict]:
        folder, script = tmp_path / f"{name}_{count}", Path(__file__).with_name("on_gpus.py")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration(name, tmp_path)]
        words = ["--mixed_precision", "no", "--num_processes", str(count), str(script), case, str(folder)]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
        done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=600, env=os.environ | visible)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return torch.load(folder / "weights.pt")

    one, shared = weights("ddp", 1), weights(engine, processes)
    for step in (1, 2):
        assert relative_error(one[0], shared[step], one[step]) < 1e-3


# --- resuming ---


def model_for_kernels():
    """With heads that flex attention takes."""
    return small_model(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, dtype=torch.float32)


@pytest.mark.parametrize("case", ["full", "lora", "checkpointing"])
def test_resumed_run_ends_in_the_same_bits(tmp_path, case):
    """Rollouts enough for the compiled kernels, in bfloat16."""
    settings = ON_GPU | dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=8)
    settings["gradient_checkpointing"] = case == "checkpointing"
    rows = training.documents([40, 33, 38, 40, 25, 40, 31, 40])
    keywords = dict(peft_config=lora("q_proj", "up_proj")) if case == "lora" else {}
    whole = train(model_for_kernels(), rows, tmp_path / "whole", settings=settings, **keywords)
    resume = str(tmp_path / "whole" / "checkpoint-2")
    rest = train(model_for_kernels(), rows, tmp_path / "rest", resume=resume, settings=settings, **keywords)
    for name, weight in whole.weights[-1].items():
        assert torch.equal(weight, rest.weights[-1][name]), name
    rollouts = "rollouts/step_000004.parquet"
    assert files(rest.folder, rollouts) == files(whole.folder, rollouts) != {}
    assert read_metrics(rest.folder)[-1]["loss"] == read_metrics(whole.folder)[-1]["loss"]


# --- faster and smaller ---


def test_compiled_step_is_the_oracles(tmp_path):
    """With the kernels that are written for it, in float32."""
    model = small_model(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, dtype=torch.float32, scale=8.0)
    plain = deepcopy(model)
    settings = dict(use_cpu=False, bf16=False, num_generations=8, torch_compile=True)
    run = train(model, ROWS, tmp_path, settings=settings)
    run.weights[:] = [{name: weight.cpu() for name, weight in step.items()} for step in run.weights]
    check_step(run, plain, oracle_documents(ROWS), tolerance=1e-3, metric_tolerance=1e-3)


@pytest.mark.parametrize("adapted", [False, True])
def test_offloading_changes_no_bit(tmp_path, adapted):
    """Of two steps of several micro-batches each, whose activations are large enough to be moved."""
    settings = ON_GPU | dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    settings |= dict(num_generations=8, gradient_checkpointing=True)
    rows = training.documents([40, 33, 38, 40, 25, 40, 31, 40])
    keywords = dict(peft_config=lora("q_proj", "up_proj")) if adapted else {}
    runs = []
    for offloading in (False, True):
        own = settings | dict(activation_offloading=offloading)
        runs.append(train(model_for_kernels(), rows, tmp_path / str(offloading), settings=own, **keywords))
    for name, weight in runs[0].weights[-1].items():
        assert torch.equal(weight, runs[1].weights[-1][name]), name


# --- bases of few bits ---


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "tolerance"), [("4", 1e-3), ("4, nested", 1e-3), ("8", 0.1)])
def test_step_on_few_bits_is_that_on_their_values(tmp_path, bits, tolerance):
    """On a GPU, against the CPU's oracle, in float32; with 8 bits activations are rounded as well."""
    model = quantised(tmp_path / "base", bits, device="cuda")
    plain = adapted(dequantised(model), lora("q_proj", "up_proj")).cpu()
    run = train(
        adapted(model, lora("q_proj", "up_proj")), ROWS, tmp_path / "run", settings=dict(use_cpu=False, bf16=False)
    )
    for i, weights in enumerate(run.weights):
        trained = {name: value.cpu() for name, value in weights.items() if "lora" in name}
        run.weights[i] = plain.state_dict() | trained
    check_step(run, plain, oracle_documents(ROWS), tolerance=tolerance, metric_tolerance=tolerance)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4", "8"])
def test_features_of_few_bits_are_the_bases(tmp_path, bits):
    check_features_of_few_bits(tmp_path, bits, "cuda", **ON_GPU)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4", "8"])
def test_resume_on_few_bits(tmp_path, bits):
    check_resume_on_few_bits(tmp_path, bits, **ON_GPU)
