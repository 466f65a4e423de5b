"""Memory that runs out: what is said before a run and in the middle of one, and what is left to go on from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import out_of_memory
from ebft import memory_guard
from ebft.memory_guard import GIB, is_out_of_memory
from training import documents, small_model, train, trainer


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return out_of_memory.run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run in a process of its own that ran out of memory: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("broken")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, out_of_memory.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2, done.stderr[-3000:]
    return folder, done.stdout


def test_message_says_what_was_held_what_to_change_and_where_to_go_on(broken):
    folder, text = broken
    assert "out of memory on cpu at per_device_train_batch_size=2: this micro-batch has 2 rows of 480 tokens" in text
    planned = re.search(r"The plan says (.*), ([\d.]+) GiB at the worst moment", text)
    assert planned is not None
    assert "activations" in planned[1] and float(planned[2]) > 0.2
    assert "set per_device_train_batch_size: 1 with gradient_accumulation_steps: 2 (the same update)" in text
    assert f"{folder}/checkpoint-2 is intact: go on with --resume_from_checkpoint {folder}/checkpoint-2" in text


def test_last_checkpoint_goes_on_with_the_change_that_was_named(broken, unbroken):
    folder, _ = broken
    assert not (folder / "checkpoint-4").exists()
    changed = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    resumed = out_of_memory.run(folder, resume=str(folder / "checkpoint-2"), **changed)
    assert len(resumed.weights) == 3
    for name, weight in unbroken.weights[-1].items():
        torch.testing.assert_close(resumed.weights[-1][name], weight, rtol=1e-4, atol=1e-5)
    assert [m["step"] for m in resumed.metrics] == [1, 2, 3, 4]
    assert (Path(folder) / "checkpoint-4" / "trainer_state.json").exists()


def test_only_memory_is_explained(tmp_path):
    ours = trainer(small_model(), documents([20]), tmp_path)
    with pytest.raises(RuntimeError, match="something else"), ours.memory.explained():
        raise RuntimeError("something else")
    with pytest.raises(ValueError, match=r"before the first micro-batch .*no checkpoint yet"), ours.memory.explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert is_out_of_memory(RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(ValueError("out of memory."))


def test_a_model_that_cannot_fit_is_refused_before_it_is_placed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_guard, "device_memory", lambda device, available=False: 1000)
    with pytest.raises(ValueError, match=r"the model does not fit: .* train an adapter \(use_peft: true\)"):
        trainer(small_model(), documents([20]), tmp_path, settings=dict(optim="adamw_torch"))


def test_a_micro_batch_that_may_not_fit_is_warned_of_once_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_guard, "device_memory", lambda device, available=False: int(0.01 * GIB))
    model, rows = small_model(dtype=torch.float32, hidden_size=64), documents([20, 150])
    with pytest.warns(
        UserWarning, match="per_device_train_batch_size=64 may need .*; if memory runs out, set"
    ) as told:
        train(model, rows, tmp_path, settings=dict(max_length=256))
    assert sum("if memory runs out" in str(warning.message) for warning in told) == 1
    assert (tmp_path / "metrics.jsonl").exists()


def test_memory_that_runs_out_while_several_micro_batches_are_sampled(tmp_path):
    """What is named is what was sampled together, and the setting that makes it less."""
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, reuse_sampling_forward=False)
    ours = trainer(
        small_model(),
        documents([30, 30, 30, 30, 40, 30]),
        tmp_path,
        settings=settings | dict(per_device_generation_batch_size=6),
    )

    def sample(inputs):
        raise torch.OutOfMemoryError("no more")

    ours.sample = sample
    with pytest.raises(ValueError, match=r"while sampling 6 rows of up to 40 tokens and \d+ blocks at once; to go"):
        ours.train()
    with pytest.raises(ValueError, match="set per_device_generation_batch_size: 3. there is no"):
        ours.train()


@pytest.mark.parametrize(("rows", "remedy"), [(4, "set per_device_eval_batch_size: 2"), (1, "eval_strategy: no")])
def test_memory_that_runs_out_in_evaluation(tmp_path, rows, remedy):
    """Not the last micro-batch of training is named, and not its setting."""
    settings = dict(
        per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=rows
    )
    held_out = Dataset.from_list(documents([38] * 4))
    ours = trainer(small_model(), documents([20, 20]), tmp_path, settings=settings, eval_dataset=held_out)
    sample = ours.sample

    def sampled(inputs, **options):
        if options:
            raise torch.OutOfMemoryError("no more")
        return sample(inputs)

    ours.sample = sampled
    with pytest.raises(ValueError, match=f"while evaluating {rows} rows of up to 38 tokens .*{remedy}"):
        ours.train()


def test_what_ran_out_in_one_run_is_forgotten_in_the_next(tmp_path, monkeypatch):
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, reuse_sampling_forward=False)
    rows, settings = documents([30] * 6), settings | dict(per_device_generation_batch_size=6)
    ours = trainer(small_model(), rows, tmp_path, settings=settings)
    sample = ours.sample

    def broken(inputs):
        raise torch.OutOfMemoryError("no more")

    ours.sample = broken
    with pytest.raises(ValueError, match="while sampling 6 rows"):
        ours.train()
    ours.sample = sample
    monkeypatch.setattr(memory_guard, "device_memory", lambda *args, **options: 1000)
    with pytest.warns(UserWarning, match="per_device_train_batch_size=2 may need"):
        ours.train()
