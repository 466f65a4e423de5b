"""The plan of several processes: what each of them holds and sends."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ebft.cli import main
from ebft.communication import bytes_per_update
from ebft.features import FeatureNetwork
from ebft.footprint import Footprint
from ebft.planning import Documents, Method
from ebft.sizes import network_shape, weights_held
from tiny_models import tiny_model

ROW = Documents.of_length(256, 8, 8, 8, None).largest_row


def run_of(adapter: bool = False, bf16: bool = False) -> Footprint:
    """A run of one process; its feature network is a copy, or under adapters the base."""
    model = tiny_model("qwen2", dtype=torch.float32)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if adapter else model
    network = FeatureNetwork(policy if adapter else AutoModelForCausalLM.from_config(model.config))
    weights = weights_held(policy, network, None, None)
    shape = network_shape(model.base_model)
    return Footprint(weights, Method(4, 8, feature_depth=0.75), shape, network_shape(network.decoder), bf16=bf16)


def shared(run: Footprint, engine: str, processes: int) -> Footprint:
    return replace(run, engine=engine, processes=processes)


@pytest.mark.parametrize("adapter", [False, True])
def test_fsdp2_holds_a_share_of_everything(adapter):
    run = run_of(adapter)
    for name, size in run.lasting().items():
        assert shared(run, "fsdp2", 8).lasting()[name] == pytest.approx(size / 8)


def test_ddp_holds_everything_and_zero2_a_share_of_what_trains():
    run, held = run_of(bf16=True), run_of(bf16=True).lasting()
    ddp, zero2 = (shared(run, engine, 4).lasting() for engine in ("ddp", "zero2"))
    assert ddp == held | {"gradients": 2 * held["gradients"]}
    weights = held["weights"] / 2 + held["weights"] / 4
    shares = {name: held[name] / 4 for name in ("AdamW state", "gradients")}
    assert zero2 == pytest.approx(held | shares | {"weights": weights})
    assert shared(run, "zero1", 4).lasting()["gradients"] == 2 * held["gradients"]


def test_layers_and_the_rest_are_all_weights():
    weights = run_of().weights
    assert weights.policy == pytest.approx(4 * weights.layer + weights.rest)  # of four layers, all alike


def test_weights_gathered_for_a_forward_are_in_the_total():
    run = run_of()
    one, two = run.memory(ROW, 1), shared(run, "fsdp2", 10**9).memory(ROW, 1)
    assert two["gathered weights"] == 3 * run.weights.layer + run.weights.rest
    assert two["in update"] >= one["in update"] + two["gathered weights"]
    whole = replace(shared(run, "fsdp2", 10**9), gathers=True).memory(ROW, 1)
    more = whole["in sampling"] - two["in sampling"]
    assert more == pytest.approx(run.weights.policy - two["gathered weights"])
    autocast = replace(run, bf16=True)
    half = shared(autocast, "fsdp2", 10**9).memory(ROW, 1)
    assert half["gathered weights"] == two["gathered weights"] / 2
    assert half["activations"] < autocast.memory(ROW, 1)["activations"], "no casts, and bfloat16 between the layers"


def test_bytes_sent_are_those_of_the_collectives():
    run, trained = run_of(), 4 * run_of().weights.trained
    assert bytes_per_update(shared(run, "ddp", 2), 4, 1) == {"gradients": trained, "total": trained}
    zero = bytes_per_update(shared(replace(run, bf16=True), "zero2", 4), 3, 1)
    assert zero == pytest.approx({"gradients": 1.125 * trained, "weights": 0.375 * trained, "total": 1.5 * trained})
    fsdp2 = bytes_per_update(shared(run, "fsdp2", 4), 3, 2)
    policy, feature = run.weights.policy, run.weights.feature
    gathers = {"sampling": 2 * 8 * policy, "features": 3 * feature, "reference": 0, "update": 3 * 2 * policy}
    expected = {name: 0.75 * size for name, size in (gathers | {"gradients": 3 * trained}).items()}
    assert fsdp2 == pytest.approx(expected | {"total": sum(expected.values())})
    once = bytes_per_update(replace(shared(run, "fsdp2", 4), gathers=True), 3, 2)
    assert once["sampling"] == fsdp2["sampling"] / 8 and once["update"] == fsdp2["update"]


def test_an_adapter_sends_its_base_but_not_its_gradients():
    run = run_of(adapter=True)
    sent = bytes_per_update(shared(run, "fsdp2", 2), 1, 1)
    assert sent["gradients"] == 2 * run.weights.trained < 0.01 * sent["update"]
    assert sent["features"] == pytest.approx(0.5 * 0.75 * run.weights.policy)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    from test_plan import SIZES, Qwen2Config, options, save_model

    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "bare", Qwen2Config(**SIZES), weights=False)

    def plan(*words: str) -> dict:
        status = main(["plan", *options(data=None), "--json", *words])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return plan


def test_plan_of_several_processes(planned):
    one = planned()
    assert "communication" not in one and one["settings"]["engine"] == "ddp"
    words = ["--num_processes", "4", "--accelerate_config", "fsdp2"]
    four = planned(*words, "--bandwidth", "50")
    assert four["settings"]["engine"] == "fsdp2" and not four["settings"]["reuse_sampling_forward"]
    assert four["memory"]["weights"] == one["memory"]["weights"] / 4
    sent, seconds = (four["communication"][f"{x} per update"] for x in ("bytes sent", "seconds"))
    assert seconds == pytest.approx({name: size / 50e9 for name, size in sent.items()})
    at_once = planned(*words, "--per_device_generation_batch_size", "16")["communication"]["bytes sent per update"]
    assert at_once["sampling"] == sent["sampling"] / 4 and at_once["update"] == sent["update"]


@pytest.mark.parametrize(
    ("stage", "status", "said"),
    [(0, 2, "zero_stage=0 shares"), (2, 0, '"engine": "zero2"'), (3, 2, "zero_stage=3 fetches")],
)
def test_plan_of_deepspeeds_own_file(planned, stage, status, said):
    """In a process of its own, which DeepSpeed's settings leave their marks on."""
    pytest.importorskip("deepspeed")
    from test_plan import options

    settings = json.dumps({"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"})
    Path("zero.json").write_text(settings)
    words = [*options(data=None), "--json", "--num_processes", "2", "--deepspeed", "zero.json"]
    done = subprocess.run([sys.executable, "-m", "ebft.cli", "plan", *words], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr


def test_plan_refuses_what_training_does(planned, capsys):
    words = ["plan", "--model_name_or_path", "bare", "--num_processes", "2", "--accelerate_config", "zero3"]
    assert main(words) == 2
    assert "accelerate_config: zero3 is zero3, on which EBFT does not run; use fsdp2" in capsys.readouterr().err
    assert main([*words[:-1], "ddp", "--bandwidth", "0"]) == 2
    assert "bandwidth: got 0.0; give GB/s" in capsys.readouterr().err
