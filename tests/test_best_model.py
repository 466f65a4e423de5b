"""The best model and early stopping by metrics of ours: right by default, checked early, exact after a resume."""

import json

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from ebft import EBFTConfig, best_model
from ebft.callbacks import EarlyStopping, TrainingClock
from ebft.cli import main
from ebft.cli.arguments import parse
from tiny import byte_bpe_tokenizer
from training import config, documents, read_metrics, small_model, train, trainer

REQUIRED = ["--model_name_or_path", "some/model", "--dataset_name", "some/data"]
ROWS, HELD_OUT = documents([24] * 6), documents([24, 28], seed=1)
SAVING = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
BEST = SAVING | dict(load_best_model_at_end=True, metric_for_best_model="eval_feature_matching_loss")


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_feature_matching_loss", False),
        ("ce_loss/answer", False),
        ("eval_ce_loss/all", False),
        ("eval_mine_ce_loss/all", False),
        ("eval_kl", False),
        ("eval_rewards/diversity/mean", False),
        ("eval_completions/duplicate_rate", False),
        ("eval_reward", True),
        ("eval_rewards/alignment_unwhitened/mean", True),
        ("eval_reward_snr", True),
        ("eval_mean_token_accuracy", True),
    ],
)
def test_which_direction_is_better(tmp_path, metric, greater):
    assert EBFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model=metric).greater_is_better is greater
    chosen = EBFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model=metric, greater_is_better=not greater)
    assert chosen.greater_is_better is not greater


def test_a_metric_without_a_direction_needs_one(tmp_path):
    with pytest.raises(ValueError, match="metric_for_best_model='eval_entropy': .*set greater_is_better"):
        EBFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model="eval_entropy")
    EBFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model="eval_entropy", greater_is_better=True)


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [
        ("eval_feature_maching_loss", "eval_feature_matching_loss"),
        ("feature_matching", "eval_feature_matching_loss"),
        ("eval_kl", "eval_loss"),  # beta is 0
    ],
)
def test_an_unknown_metric_is_refused_before_weights_are_loaded(tmp_path, metric, nearest):
    args = dict(metric_for_best_model=metric, greater_is_better=False)
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}' is no metric .* mean {nearest}?"):
        trainer(small_model(), ROWS, tmp_path, settings=args, eval_dataset=Dataset.from_list(HELD_OUT))


def test_names_of_several_datasets_and_metrics_of_the_users(tmp_path):
    args = config(tmp_path, metric_for_best_model="eval_b_loss")
    best_model.check_metric(args, {"a": [], "b": []}, False)
    with pytest.raises(ValueError, match="did you mean eval_a_loss|did you mean eval_c_loss"):
        best_model.check_metric(args, {"a": [], "c": []}, False)
    best_model.check_metric(config(tmp_path, metric_for_best_model="mine"), HELD_OUT, True)


def test_every_metric_of_an_evaluation_is_known(tmp_path):
    """The check knows what an evaluation logs."""
    run = trainer(small_model(), ROWS, tmp_path, settings=dict(beta=0.1), eval_dataset=Dataset.from_list(HELD_OUT))
    for metric in run.evaluate():
        if not metric.endswith(("_per_second", "runtime", "epoch", "preparation_time")):
            args = config(tmp_path, beta=0.1, metric_for_best_model=metric, greater_is_better=True)
            best_model.check_metric(args, HELD_OUT, False)


class Plan(TrainerCallback):
    """Puts planned values in the place of what was evaluated."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics[self.name] = self.values[state.global_step - 1]


def stopping_run(folder, values, steps, patience=2, resume=None, **more):
    plan = Plan(BEST["metric_for_best_model"], values)
    settings = BEST | dict(max_steps=steps) | more
    callbacks = [plan, EarlyStopping(patience)]
    evaluation = Dataset.from_list(HELD_OUT)
    return train(small_model(), ROWS, folder, resume, settings=settings, callbacks=callbacks, eval_dataset=evaluation)


def test_training_stops_and_the_best_weights_are_kept(tmp_path):
    run = stopping_run(tmp_path, [3.0, 1.0, 2.0, 1.5, 0.5], steps=5)
    assert run.trainer.state.global_step == 4
    assert run.trainer.state.best_metric == 1.0
    run.trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    assert all(saved[name].equal(best[name]) for name in saved)
    assert any(not saved[name].equal(last[name]) for name in saved)


def test_the_newest_checkpoint_is_kept_beside_the_best(tmp_path):
    """Else a run that had stopped would go on from the best one, and do all that followed once more."""
    run = stopping_run(tmp_path, [3.0, 1.0, 2.0, 1.5, 0.5], steps=5, save_total_limit=1)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert run.trainer.args.save_total_limit == 1
    stopping_run(tmp_path, [3.0, 1.0, 2.0, 1.5, 0.5], steps=5, resume="auto", save_total_limit=1)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_patience_goes_on_after_a_resume(tmp_path, capsys):
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    unbroken = stopping_run(tmp_path / "unbroken", values, steps=6)
    assert unbroken.trainer.state.global_step == 3
    stopping_run(tmp_path / "broken", values, steps=2)
    resumed = stopping_run(tmp_path / "broken", values, steps=6, resume=True)
    assert resumed.trainer.state.global_step == 3
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "unbroken")
    assert stopping_run(tmp_path / "broken", values, steps=6, resume=True).trainer.state.global_step == 3
    assert "the run stopped early, after 2 evaluations" in capsys.readouterr().out
    assert stopping_run(tmp_path / "broken", values, steps=6, patience=3, resume=True).trainer.state.global_step == 4


@pytest.mark.parametrize("callback", [EarlyStopping(9), TrainingClock(1e9)])
def test_a_resume_may_add_what_ends_it(tmp_path, callback):
    evaluation = Dataset.from_list(HELD_OUT)
    train(small_model(), ROWS, tmp_path, settings=BEST, eval_dataset=evaluation)
    settings = BEST | dict(max_steps=2)
    train(small_model(), ROWS, tmp_path, True, settings=settings, callbacks=[callback], eval_dataset=evaluation)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert type(callback).__name__ in state["stateful_callbacks"]


def test_early_stopping_on_the_command_line():
    words = [*REQUIRED, "--early_stopping_patience", "3"]
    arguments = parse([*words, "--eval_split_size", "0.1"])
    assert arguments.training.metric_for_best_model == "loss" and arguments.training.greater_is_better is False
    given = parse([*words, "--eval_split_size", "0.1", "--metric_for_best_model", "eval_reward"])
    assert given.training.metric_for_best_model == "eval_reward" and given.training.greater_is_better is True


@pytest.mark.parametrize("method", [["ebft"], ["sft"], ["rlvr", "--reward", "bleu", "--max_completion_length", "4"]])
def test_every_method_stops_early(tmp_path, method, capsys):
    """Where nothing counts as better any more, after the second evaluation."""
    small_model().save_pretrained(tmp_path / "model")
    byte_bpe_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"count {i} and then", "completion": f" {i + 1} or {i + 2}"} for i in range(8)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "my.jsonl")]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--use_cpu", "--max_length", "64"]
    words += ["--eval_split_size", "4", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    words += ["--gradient_accumulation_steps", "1", "--per_device_eval_batch_size", "4", "--load_best_model_at_end"]
    stopping = ["--early_stopping_patience", "1", "--early_stopping_threshold", "1e6"]
    assert main(["train", *words, *stopping, "--method", *method]) == 0, capsys.readouterr().err
    steps = {record["step"] for record in read_metrics(tmp_path / "run")}
    assert max(steps) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--early_stopping_patience", "3"], "early_stopping_patience: nothing is evaluated"),
        (["--early_stopping_patience", "0", "--eval_split_size", "0.1"], "early_stopping_patience: got 0"),
        (["--early_stopping_threshold", "0.1"], "does nothing without early_stopping_patience"),
        (["--early_stopping_patience", "1", "--early_stopping_threshold", "-1"], "early_stopping_threshold: got -1.0"),
    ],
)
def test_early_stopping_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        parse([*REQUIRED, *words])
