"""A run that is killed and resumed leaves what an unbroken one leaves, to the bit; others are refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import cache

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import interrupted
from ebft.checkpoints import begin
from training import assert_equal_weights, documents, files, read_metrics, reseal, small_model, train, trainer


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return cache(lambda kind: interrupted.run(kind, tmp_path_factory.mktemp(kind)))


def kill_run(kind, folder, step, moment):
    command = [sys.executable, interrupted.__file__, kind, str(folder), str(step), moment]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


@pytest.mark.parametrize("kind", interrupted.KINDS)
def test_killed_and_resumed_equals_unbroken(unbroken, tmp_path, kind):
    step, moment = random.randrange(3, 5), random.choice(interrupted.MOMENTS)
    print(f"killed at step {step}, {moment}")
    kill_run(kind, tmp_path, step, moment)
    assert files(tmp_path, "checkpoint-*/trainer_state.json")
    # Two checkpoints that a kill left half-written, both newer than any whole one.
    begin(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-9").mkdir()

    resumed, whole = interrupted.run(kind, tmp_path, resume=True), unbroken(kind)
    assert len(resumed.weights) < len(whole.weights) == 7, "it started over"
    assert_equal_weights(resumed.weights[-1], whole.weights[-1])
    assert files(tmp_path, "metrics.jsonl") == files(whole.folder, "metrics.jsonl")
    assert files(tmp_path, "rollouts/*") == files(whole.folder, "rollouts/*")
    assert len(files(tmp_path, "rollouts/step_*.parquet")) == (3 if kind == "lora" else 6)
    state = "checkpoint-6/*model.safetensors"
    assert files(tmp_path, state) == files(whole.folder, state) != {}


def test_evaluation_leaves_training_alone(unbroken, tmp_path):
    with_evaluation = unbroken("full")
    without = interrupted.run("full", tmp_path, eval_strategy="no", save_strategy="no")
    assert_equal_weights(without.weights[-1], with_evaluation.weights[-1])
    trained = [m for m in with_evaluation.metrics if "loss" in m]
    assert without.metrics == trained and len(trained) < len(with_evaluation.metrics)


def test_resume_from_an_earlier_checkpoint_by_name(unbroken, tmp_path):
    whole = unbroken("full")
    shutil.copytree(whole.folder, tmp_path / "copy")
    resumed = interrupted.run("full", tmp_path / "copy", resume=str(tmp_path / "copy" / "checkpoint-4"))
    assert len(resumed.weights) == 3
    assert_equal_weights(resumed.weights[-1], whole.weights[-1])
    assert files(tmp_path / "copy", "metrics.jsonl") == files(whole.folder, "metrics.jsonl")


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_resumed_stream_goes_on_where_it_was(tmp_path, kernel):
    def start(folder, resume=None, **settings):
        stream = Dataset.from_list(documents([23, 17, 5, 30, 6, 12, 21, 9])).to_iterable_dataset()
        settings = dict(max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2) | settings
        settings["kernel"] = kernel
        return train(small_model(scale=8.0), stream, folder, resume, settings=settings)

    whole = start(tmp_path / "whole")
    shutil.copytree(whole.folder, tmp_path / "copy")
    resumed = start(tmp_path / "copy", resume=str(tmp_path / "copy" / "checkpoint-2"))
    assert len(resumed.weights) == 3
    assert_equal_weights(resumed.weights[-1], whole.weights[-1])
    assert files(tmp_path / "copy", "metrics.jsonl") == files(whole.folder, "metrics.jsonl")


class _Killed(TrainerCallback):
    """Ends a run behind a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("strategy", ["eval_strategy", "logging_strategy"])
def test_a_checkpoint_holds_what_the_end_of_its_epoch_evaluates_and_logs(tmp_path, strategy):
    settings = {"save_steps": 1, strategy: "epoch"}
    interrupted.run("full", tmp_path / "whole", max_steps=5, **settings)
    for step in (2, 3, 5):  # within an epoch, and at the end of the first and the last
        with pytest.raises(KeyboardInterrupt):
            interrupted.run("full", tmp_path / f"{step}", None, [_Killed(step)], max_steps=5, **settings)
        interrupted.run("full", tmp_path / f"{step}", resume="auto", max_steps=5, **settings)
        assert read_metrics(tmp_path / f"{step}") == read_metrics(tmp_path / "whole")


def altered_record(whole, folder, change):
    """A copy of a run whose checkpoints say something else of its kernel."""
    shutil.copytree(whole.folder, folder)
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text())
        change(state["stateful_callbacks"]["KernelRecord"]["attributes"]["record"])
        path.write_text(json.dumps(state))
        reseal(path.parent)
    return folder


def test_the_kernel_is_taken_from_the_checkpoint(unbroken, tmp_path):
    """Though the documents would give another bandwidth."""
    folder = altered_record(unbroken("rbf"), tmp_path / "copy", lambda record: record.update(bandwidth=0.123))
    resumed = interrupted.run("rbf", folder, resume=str(folder / "checkpoint-4"))
    assert resumed.trainer.scorer.kernel.bandwidths == (0.123,)
    assert resumed.trainer.kernel_record["bandwidth"] == 0.123
    callbacks = resumed.trainer.callback_handler.callbacks
    assert [type(callback).__name__ for callback in callbacks].count("KernelRecord") == 1
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["KernelRecord"]["attributes"]["record"]["bandwidth"] == 0.123
    with pytest.raises(AssertionError):
        assert_equal_weights(resumed.weights[-1], unbroken("rbf").weights[-1])


def test_another_kernel_is_refused(unbroken, tmp_path):
    before = read_metrics(unbroken("rbf").folder)
    for change in (
        dict(kernel="linear"),
        dict(kernel="energy"),
        dict(kernel_scales=[2.0]),
        dict(kernel_bandwidth=9.0),
    ):
        with pytest.raises(ValueError, match="was trained with the kernel .*: resume with that one"):
            interrupted.run("rbf", unbroken("rbf").folder, resume=True, max_steps=8, **change)
    assert read_metrics(unbroken("rbf").folder) == before


def test_a_checkpoint_without_a_kernel_is_linear(unbroken, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(unbroken("full").folder, folder)
    assert "KernelRecord" not in (folder / "checkpoint-6" / "trainer_state.json").read_text()
    with pytest.raises(ValueError, match="with the kernel {'name': 'linear'}, not {'name': 'energy'}"):
        interrupted.run("full", folder, resume=True, max_steps=7, kernel="energy")
    assert len(interrupted.run("full", folder, resume=True, max_steps=7).weights) == 2


def test_another_feature_network_is_refused(unbroken):
    other = trainer(
        small_model(dtype=torch.float32, scale=8.0),
        interrupted.ROWS,
        unbroken("full").folder,
        settings=dict(max_steps=8),
        feature_model=small_model(dtype=torch.float32, seed=1),
    )
    before = read_metrics(unbroken("full").folder)
    with pytest.raises(ValueError, match="was trained with the feature network .*: resume with"):
        other.train(resume_from_checkpoint=True)
    assert read_metrics(unbroken("full").folder) == before


def test_a_folder_with_another_run_is_refused(unbroken, tmp_path):
    rows = documents([20])
    with pytest.raises(ValueError, match=r"output_dir=.* holds another run .* delete it"):
        train(small_model(), rows, unbroken("full").folder)
    with pytest.raises(ValueError, match="resume_from_checkpoint: output_dir=.* holds no whole checkpoint"):
        train(small_model(), rows, tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint=.*is not a whole checkpoint"):
        train(small_model(), rows, tmp_path, resume=str(tmp_path / "checkpoint-1"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir=.* is a file"):
        train(small_model(), rows, tmp_path / "file")
