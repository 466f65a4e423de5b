"""`ebft plan --calibrate`: what is timed is the run's own engine on a cut of its own model; no weights are read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ebft import calibration, feature_models, measuring, models
from ebft.blocks import BlockLayout
from ebft.cli import main
from ebft.cut import Cut, cut_model
from ebft.features import layer_list
from ebft.forward import causal_lm
from ebft.planning import Documents, Method, Work
from test_plan import SIZES, options, save_model
from training import config

CPU = torch.device("cpu")
ADAPTER = ("--use_peft", "--lora_target_modules", "all-linear", "--gradient_checkpointing")
LARGE = SIZES | dict(vocab_size=2000)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Plan for a model without weights, and ten documents of different lengths, as parsed JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "BUDGET", 0.5)
    monkeypatch.setattr(measuring, "MATRIX_ON_CPU", 256)
    save_model(tmp_path / "bare", Qwen2Config(**SIZES), weights=False)
    texts = [f"Number {i} is followed by {i + 1}." * (1 + i % 3) for i in range(10)]
    Path("my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def plan(*words: str) -> dict:
        status = main(["plan", *options(data=None if "--nothing" in words else "my.jsonl"), "--json", *words[1:]])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return plan


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ((), ["sampling", "features", "update"]),
        (("--beta", "0.1", "--packing", "--bf16", "true"), ["sampling", "features", "reference", "update"]),
        (("--rl_coef", "0", "--gradient_checkpointing"), ["update"]),
        (("--reuse_sampling_forward", "false"), ["sampling", "features", "update"]),
        (("--beta", "0.1", "--kl_estimator", "k3"), ["sampling", "features", "reference", "update"]),
        (ADAPTER, ["sampling", "features", "update"]),
        (("--feature_layers", "1", "--max_blocks", "2"), ["sampling", "features", "update"]),
        (("--kernel", "characteristic", "--pooling", "concat"), ["sampling", "features", "update"]),
        (("--kernel", "ngram", "--beta", "0.1"), ["sampling", "reference", "update"]),
        (("--kernel", "ngram", "--reuse_sampling_forward", "false"), ["sampling", "update"]),
        (("--kernel", "characteristic", "--rl_coef", "0"), ["update"]),
    ],
)
def test_every_stage_of_the_run_is_timed(planned, words, stages):
    time = planned("", *words, "--calibrate")["time"]
    assert list(time["seconds per update"]) == list(time["operations per update"]) == [*stages, "total"]
    assert all(seconds > 0 for seconds in time["seconds per update"].values())
    assert time["seconds per update"]["update"] > time["seconds of the optimiser's step in it"] > 0
    assert time["matrix rate in FLOP/s"] > 1e6 and 0 < time["share of the matrix rate"] < 1
    assert "measured on cpu" in time["note"] and "random weights" in time["note"]


def test_documents_that_cannot_be_counted_are_timed_at_full_length(planned):
    time = planned("--nothing", "--calibrate")["time"]
    assert "4 row(s)" in time["note"]
    assert time["seconds in all"] is None


def test_calibration_leaves_nothing_behind(planned):
    before = sorted(Path().rglob("*"))
    planned("", "--calibrate")
    assert sorted(Path().rglob("*")) == before


def test_tables_show_what_was_measured(planned, capsys):
    assert main(["plan", *options(), "--calibrate"]) == 0
    text = capsys.readouterr().out
    assert "measured on cpu" in text and "matrix rate" in text and "seconds per update" in text


def test_calibrate_and_flops_exclude_each_other(planned, capsys):
    assert main(["plan", *options(), "--calibrate", "--flops", "1e12"]) == 2
    assert "error: flops, calibrate: both are given" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_cut_keeps_the_first_layers_and_what_is_trained(tied, adapter):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE, tie_word_embeddings=tied), dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    cut = cut_model(model, 3, 64, CPU)
    lm = causal_lm(cut)
    assert len(layer_list(lm.base_model)[1]) == 3 and len(layer_list(causal_lm(model).base_model)[1]) == 4
    assert lm.get_output_embeddings().weight.shape == (64, 16)
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    of_whole = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    for name, parameter in cut.named_parameters():
        assert (parameter.dtype, parameter.requires_grad) == of_whole[name]
        assert parameter.device == CPU and parameter.isfinite().all()
    whole = cut_model(model, 1, None, CPU)
    assert causal_lm(whole).get_output_embeddings().weight.shape == (2000, 16)
    assert causal_lm(model).get_output_embeddings().weight.device.type == "meta"


def test_seconds_grow_by_one_layer_at_a_time(tmp_path, monkeypatch):
    """With stages that take a known time, the estimate is that of the whole model and the whole micro-batch."""
    args = config(tmp_path, per_device_train_batch_size=2, completion_length=4, stride=4)
    deep = Qwen2Config(**LARGE | {"num_hidden_layers": 9})
    with torch.device("meta"):
        policy = models.load_policy(AutoModelForCausalLM.from_config(deep), args)
        network = feature_models.load_feature_network(policy, args)  # layers 2, 4 and 6
    documents = Documents.of_length(40, 4, 4, 4, None)
    method = Method(3, 4)
    batch = calibration.typical_micro_batch(None, documents, args, "all", method, most_rows=1)
    assert (batch.rows, batch.share) == (1, 0.5)

    def known(cut):
        layers = len(layer_list(causal_lm(cut.policy).base_model)[1])
        head = 10.0 if causal_lm(cut.policy).config.vocab_size == 2000 else 1.0
        return {"sampling": head + 2 * layers, "features": 1.0 + 3 * layers, "update": head + 5 * layers}

    monkeypatch.setattr(Cut, "step", known)
    measured = calibration.stage_seconds(args, policy, network, method, batch)
    del measured["optimiser"]
    assert measured == {"sampling": 2 * (10 + 2 * 9), "features": 2 * (1 + 3 * 6), "update": 2 * (10 + 5 * 9)}


def test_compilation_is_not_counted(monkeypatch):
    """On a GPU each first step takes longer than all measuring should; without it there is time for every round."""
    steps = []

    class Compiling:
        def __init__(self, *args):
            self.steps = []
            steps.append(self.steps)

        def step(self):
            self.steps.append(100.0 if not self.steps else 1.0)
            return {"update": self.steps[-1]}

    monkeypatch.setattr(calibration, "Cut", Compiling)
    monkeypatch.setattr(calibration, "optimiser_seconds", lambda *args: 0.0)
    args = SimpleNamespace(device=torch.device("cuda"))
    policy = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES))
    micro_batch = calibration.MicroBatch({"input_ids": []}, share=1.0)
    measured = calibration.stage_seconds(cast(Any, args), policy, None, Method(2, 4), micro_batch)
    assert measured["update"] == 1.0
    assert [len(of_cut) for of_cut in steps] == [2 + calibration.MOST_ROUNDS] * 3


def test_typical_micro_batch_has_the_average_size(tmp_path):
    lengths = [20, 30, 40, 25, 35, 15, 28, 33]
    rows = [
        {
            "input_ids": list(range(3, 3 + n)),
            "completion_mask": [1] * n,
            "loss_mask": [1] * n,
            "document_ids": [i],
            "seq_lengths": [n],
        }
        for i, n in enumerate(lengths)
    ]
    args = config(tmp_path, per_device_train_batch_size=3, completion_length=4, stride=4, context_length=4)
    layouts = [BlockLayout(n, 4, 4, 4) for n in lengths]
    documents = Documents([], [Work(n, layout.num_blocks, 0, 0) for n, layout in zip(lengths, layouts, strict=True)])
    method = Method(args.num_generations, 4)
    whole = calibration.typical_micro_batch(rows, documents, args, "all", method, most_rows=9)
    assert whole.rows == 3 and whole.share == pytest.approx(1, abs=0.1)
    part = calibration.typical_micro_batch(rows, documents, args, "all", method, most_rows=2)
    assert part.rows == 2 and part.share == pytest.approx(2 / 3, abs=0.1)
