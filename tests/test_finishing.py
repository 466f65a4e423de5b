"""A resume of a run that had come to its end: its model is loaded, best or last, and nothing is trained."""

import json

import pytest
from safetensors.torch import load_file

import interrupted
from ebft import EBFTConfig, artifacts
from ebft.callbacks import EarlyStopping, TrainingClock
from ebft.cli import main
from ebft.cli.train import find_checkpoint
from ebft.locks import is_locked
from test_best_model import stopping_run
from tiny import byte_bpe_tokenizer
from training import assert_equal_weights, files, read_metrics, small_model

KEPT = ("metrics.jsonl", "timing.jsonl", "rollouts/*", "checkpoint-*/*")


def kept(folder):
    return {pattern: files(folder, pattern) for pattern in KEPT}


@pytest.mark.parametrize("steps", [4, 6])  # within an epoch, and at the end of one
def test_nothing_is_trained_behind_the_last_step(tmp_path, capsys, steps):
    whole = interrupted.run("full", tmp_path, max_steps=steps)
    before = kept(tmp_path)
    resumed = interrupted.run("full", tmp_path, resume="auto", max_steps=steps)
    assert len(resumed.weights) == 1, "no step began"
    assert_equal_weights(resumed.weights[-1], whole.weights[-1])
    assert kept(tmp_path) == before
    assert f"the run ended after {steps} steps; raise max_steps" in capsys.readouterr().out
    further = interrupted.run("full", tmp_path, resume=True, max_steps=steps + 2)
    assert len(further.weights) == 3


def test_nothing_is_trained_when_the_time_is_spent(tmp_path, capsys):
    def run(seconds, resume=None):
        clock = TrainingClock(seconds, every=1e6)
        return interrupted.run("ngram", tmp_path, resume=resume, callbacks=[clock], save_strategy="no")

    assert run(1e-9).trainer.state.global_step == 1
    assert len(run(1e-9, resume=True).weights) == 1
    assert "max_train_seconds=1e-09 are spent; raise them to go on" in capsys.readouterr().out
    assert run(1e6, resume=True).trainer.state.global_step == 6


@pytest.mark.parametrize("folder", ["run", "moved"])
def test_of_a_run_that_stopped_early_the_best_model_is_loaded(tmp_path, folder):
    values = [3.0, 1.0, 2.0, 1.5, 0.5]
    stopping_run(tmp_path / "run", values, steps=5)
    folder = (tmp_path / "run").rename(tmp_path / folder)
    before = kept(folder)
    resumed = stopping_run(folder, values, steps=5, resume=True)
    resumed.trainer.save_model()
    saved, best = (load_file(folder / name / "model.safetensors") for name in ("", "checkpoint-2"))
    assert all(saved[name].equal(best[name]) for name in saved)
    assert kept(folder) == before


@pytest.mark.parametrize("save_steps", [3, 4])  # three steps make an epoch
def test_a_run_that_an_epochs_evaluation_stopped_is_at_its_end(tmp_path, save_steps):
    def run(resume):
        settings = dict(max_steps=12, save_steps=save_steps, eval_strategy="epoch", metric_for_best_model="eval_loss")
        return interrupted.run("full", tmp_path, resume, [EarlyStopping(1, 1e6)], **settings)

    assert run(None).trainer.state.global_step == 6
    before = kept(tmp_path)
    assert len(run("auto").weights) == 1, "a step began"
    assert kept(tmp_path) == before


def test_a_run_that_a_steps_evaluation_stopped_is_at_its_end(tmp_path):
    for resume, steps in ((None, 3), (True, 0)):
        run = stopping_run(tmp_path, [1.0, 2.0, 3.0], 9, resume=resume, save_steps=2, load_best_model_at_end=False)
        assert len(run.weights) - 1 == steps


def command(tmp_path, *words, output="run"):
    """`ebft train` on rows of which two steps make an epoch."""
    small_model().save_pretrained(tmp_path / "model")
    byte_bpe_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"count {i} and then", "completion": f" {i + 1} or {i + 2}"} for i in range(4)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("train", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "my.jsonl")),
        *("--output_dir", str(tmp_path / output), "--max_steps", "3", "--use_cpu", "--max_length", "64"),
        *("--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2", "--save_steps", "1", *words),
    ]


@pytest.mark.parametrize(
    "method",
    [
        ["ebft"],
        ["ebft", "--use_peft", "--lora_r", "2", "--learning_rate", "1e-3"],
        ["sft"],
        ["rlvr", "--reward", "bleu", "--max_completion_length", "4"],
    ],
)
def test_a_run_killed_before_its_model_was_written_has_it_written(tmp_path, method, capsys):
    """Three steps, where two make an epoch: transformers alone would train a fourth."""
    evaluation = ["--eval_dataset_name", str(tmp_path / "my.jsonl"), "--eval_strategy", "epoch", "--eval_on_start"]
    words = command(tmp_path, *evaluation, "--resume_from_checkpoint", "auto", "--method", *method)
    assert main(words) == 0, capsys.readouterr().err
    [model] = (tmp_path / "run").glob("*.safetensors")
    before, whole = kept(tmp_path / "run"), model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    assert main(words) == 0, capsys.readouterr().err
    assert model.read_bytes() == whole
    assert kept(tmp_path / "run") == before
    assert [record["step"] for record in read_metrics(tmp_path / "run")][-1] == 3
    assert "Nothing is left to train behind" in capsys.readouterr().out


def test_sft_goes_on_in_another_folder(tmp_path, capsys):
    sft = ["--method", "sft"]
    assert main(command(tmp_path, *sft)) == 0
    resume = [*sft, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    assert main(command(tmp_path, *resume, "--weight_decay", "0.5", output="other")) == 2
    assert "weight_decay 0.0 -> 0.5" in capsys.readouterr().err
    assert main(command(tmp_path, *resume, output="other")) == 0, capsys.readouterr().err
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()
    assert main(command(tmp_path, *resume, output="other")) == 2
    assert "holds another run" in capsys.readouterr().err


def test_no_other_run_begins_while_a_start_is_forgotten(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    seen = []
    monkeypatch.setattr(artifacts, "forget_start", lambda folder: seen.append(is_locked(folder, artifacts.LOCK)))
    args = EBFTConfig(str(tmp_path), resume_from_checkpoint="auto", use_cpu=True, report_to=[])
    assert find_checkpoint(args) is None and seen == [True]
    assert find_checkpoint(args, writes=False) is None and seen == [True]
    assert not is_locked(tmp_path, artifacts.LOCK)
    monkeypatch.setenv("RANK", "1")  # the first process does it
    assert find_checkpoint(args) is None and seen == [True]
