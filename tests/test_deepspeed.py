"""DeepSpeed's ZeRO on two gloo processes does what one process does without it; it stops and goes on as it should."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import two_processes
from ebft import EBFTConfig, pickles
from ebft.checkpoints import read_manifest
from ebft.resuming import check_run
from hostile import Hostile
from test_two_processes import alone, check_equal, launch  # noqa: F401 - `alone` is a fixture
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model
from training import read_metrics, relative_error

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    launch(2, folder, "--zero")
    return folder


@pytest.mark.parametrize("case", two_processes.ZERO)
def test_two_processes_equal_one(zero, alone, case):  # noqa: F811
    """DeepSpeed keeps float32 masters whatever the model is of."""
    check_equal(zero / case, alone(case), within=1e-5)


@pytest.mark.parametrize("case", two_processes.LONG_RUNS)
def test_ten_steps_and_a_resume(zero, alone, case):  # noqa: F811
    one, weights = alone(case), [torch.load(zero / f"{case}_{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(weights[0][-1][name], weights[1][-1][name]) for name in weights[0][-1])
    assert relative_error(one.weights[0], weights[0][-1], one.weights[-1]) < 1e-5
    resumed = torch.load(zero / "resumed" / f"{case}_0.pt")
    assert len(resumed) == 6
    assert all(torch.equal(resumed[-1][name], weight) for name, weight in weights[0][-1].items())
    assert read_metrics(zero / "resumed" / case) == read_metrics(zero / case)


def test_both_stop_behind_the_step_that_is_not_finite(zero):
    for rank in (0, 1):
        message = (zero / f"error_{rank}.txt").read_text()
        assert message.startswith("Step 2 has loss") and "gradient norm inf" in message  # as DeepSpeed says
        assert "stopped behind the step" in message


def test_who_may_go_on(zero, tmp_path):
    """Else a new optimiser would begin without a word, or DeepSpeed would end with a traceback."""
    checkpoint, settings = zero / "long" / "checkpoint-5", read_manifest(zero / "long" / "checkpoint-5")["settings"]

    def check(path, processes, deepspeed):
        args = SimpleNamespace(world_size=processes)
        trainer: Any = SimpleNamespace(args=args, is_fsdp_enabled=False, is_deepspeed_enabled=deepspeed)
        check_run(path, settings, trainer)

    check(checkpoint, 2, deepspeed=True)
    with pytest.raises(ValueError, match="was written with DeepSpeed, .*: go on with it, or start a new run from a"):
        check(checkpoint, 2, deepspeed=False)
    per_device = settings["per_device_train_batch_size"]
    settings["per_device_train_batch_size"] = per_device * 2
    with pytest.raises(ValueError, match="was written by 2 processes, and DeepSpeed goes on with as many alone, not"):
        check(checkpoint, 1, deepspeed=True)
    settings["per_device_train_batch_size"] = per_device
    plain = shutil.copytree(checkpoint, tmp_path / "checkpoint-5")
    shutil.rmtree(plain / "global_step5")
    with pytest.raises(ValueError, match="was written without DeepSpeed, .*: go on without it"):
        check(plain, 2, deepspeed=True)


def test_a_checkpoint_is_data_alone(zero, tmp_path):
    """DeepSpeed itself would run what is in its files."""
    copy = shutil.copytree(zero / "long" / "checkpoint-5", tmp_path / "checkpoint-5")
    with pickles.resuming(copy):
        pass
    [states, *_] = sorted((copy / "global_step5").glob("*optim_states.pt"))
    torch.save(torch.load(states, weights_only=False) | {"a": Hostile(tmp_path / "mark")}, states)
    with (
        pytest.raises(ValueError, match=r"states\.pt holds more than data or is damaged"),
        pickles.resuming(copy),
    ):
        pass
    assert not (tmp_path / "mark").exists()


def test_what_latest_leads_to_is_data_alone(zero):
    assert not (zero / "mark").exists()
    for rank in (0, 1):
        assert "holds more than data or is damaged" in (zero / f"led_{rank}.txt").read_text()


@pytest.mark.parametrize(("text", "said"), [(None, "No such file"), ("{zero", "line 1 column 2")])
def test_a_file_of_settings_that_cannot_be_read_is_named(tmp_path, text, said):
    file = tmp_path / "zero2.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=rf"deepspeed: .*zero2\.json cannot be read \(.*{said}.*\): give a file of"):
        EBFTConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=str(file))


def test_the_command_starts_one_process_as_well(tmp_path):
    model, tokenizer = tiny_model("qwen2"), byte_bpe_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "one and one is two " * 4}) + "\n")
    (tmp_path / "zero2.json").write_text(json.dumps(two_processes.zero()))
    words = ["--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--output_dir", "run"]
    words += ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--deepspeed", "zero2.json"]
    words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_length", "64"]
    command = [sys.executable, "-m", "ebft.cli", "train", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()
