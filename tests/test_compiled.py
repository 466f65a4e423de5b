"""`torch.compile` of norms and MLPs: the step stays the oracle's, nothing is compiled anew for each size or layer."""

import copy

import pytest
import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset
from torch._dynamo.utils import counters

from ebft.features import layer_list
from ebft.forward import causal_lm
from test_trainer_step import ROWS, check_step, make_model, oracle_documents
from tiny_models import CONFIGS, FLOAT32_ONLY
from training import documents, small_model, train, trainer

# Finds what belongs together and runs it by PyTorch's own kernels; to write new ones takes long.
CAPTURED = dict(torch_compile=True, torch_compile_backend="eager")
LOOSE = dict(tolerance=1e-3, metric_tolerance=1e-3)  # of families that are float32 alone
TWO_FORWARDS = dict(reuse_sampling_forward=False)
CASES = {
    "one forward": {},
    "two forwards": TWO_FORWARDS,
    "checkpointing": dict(gradient_checkpointing=True),
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, **TWO_FORWARDS),
}


def check_compiled(folder, model, rows=ROWS, tolerances=None, **settings):
    plain = copy.deepcopy(model)
    settings = CAPTURED | settings
    run = train(model, rows, folder, settings=settings)
    check_step(run, plain, oracle_documents(rows), **(tolerances or {}))
    for layer in layer_list(causal_lm(run.trainer.model).base_model)[1]:
        compiled = {name for name, part in layer.named_children() if part._compiled_call_impl is not None}
        names = {name for name, _ in layer.named_children()}
        assert names - compiled in ({"self_attn"}, {"attn"}, {"attention"})
    # Else accelerate would allow TF32 for all products of float32.
    assert run.trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO and run.trainer.args.torch_compile
    return run


RUNS = [("one forward", True), ("two forwards", False), ("accumulated", True), ("checkpointing", True)]


@pytest.mark.parametrize(("case", "adapted"), [*RUNS, ("checkpointing", False)])
def test_step_is_the_oracles(tmp_path, case, adapted):
    check_compiled(tmp_path, make_model(adapted), **CASES[case])


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "qwen2"])
def test_every_family(tmp_path, family):
    float32 = family in FLOAT32_ONLY
    model = make_model(family=family, dtype=torch.float32 if float32 else torch.float64)
    check_compiled(tmp_path, model, tolerances=LOOSE if float32 else None, reuse_sampling_forward=False)


def test_kernels_as_they_are_written(tmp_path):
    """By the default backend, in float32."""
    settings = dict(torch_compile_backend="inductor", **TWO_FORWARDS)
    check_compiled(tmp_path, make_model(dtype=torch.float32), tolerances=LOOSE, **settings)


def test_sizes_and_layers_share_what_is_compiled(tmp_path):
    """More layers, and steps of ever other lengths, add nothing to what one step and one evaluation compile."""
    settings = CAPTURED | TWO_FORWARDS | dict(per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1)
    held_out, graphs = Dataset.from_list(documents([9, 22], seed=7)), []
    for layers, lengths in ((2, [30, 23]), (4, [21, 19, 37, 28, 33, 16])):
        torch.compiler.reset()
        steps = dict(max_steps=len(lengths) // 2)
        model, folder = small_model(num_hidden_layers=layers), tmp_path / str(layers)
        ours = trainer(model, documents(lengths), folder, settings=settings | steps, eval_dataset=held_out)
        counters.clear()
        ours.train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1], graphs


def test_names_stay_what_they_were(tmp_path):
    """Of weights, in memory and in what is saved."""
    model = make_model()
    names = set(model.state_dict())
    run = train(model, ROWS, tmp_path, settings=CAPTURED)
    run.trainer.save_model(str(tmp_path / "saved"))
    assert set(run.trainer.model.state_dict()) == names
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in run.weights[-1].items())
    assert run.trainer.settings["torch_compile"] is True


def test_models_that_do_not_pack_are_refused(tmp_path):
    model = small_model("mamba", dtype=torch.float32)
    settings = dict(torch_compile=True, rollout="completion", max_completion_length=3)
    settings["stop_token_ids"] = list(range(61))
    with pytest.raises(ValueError, match="torch_compile=True was not tried with .*: leave it off"):
        trainer(model, documents([20, 20], prompts=[8, 8]), tmp_path, settings=settings)


def test_accelerates_own_compiling_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="dynamo_backend=INDUCTOR .* set torch_compile: true"):
        trainer(make_model(), ROWS, tmp_path)
