"""Whole runs: a stop at what is not finite, evaluation, schedules, streams, override points, files left behind."""

import copy
import re

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ProgressCallback, TrainerCallback

import step_oracle
from ebft import EBFTConfig, EBFTTrainer
from tiny import byte_bpe_tokenizer
from training import (
    assert_equal_weights,
    config,
    documents,
    read_rollouts,
    relative_error,
    small_model,
    train,
    trainer,
)

ROWS = documents([23, 17, 5, 30, 6, 12])
HELD_OUT = documents([22, 9, 5, 31, 14], seed=7, prompts=[10, 5, 2, 7, 13])


# --- what is not finite ---


class PoisonedWeight(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.get_input_embeddings().weight[7, 0] = torch.nan


class NaNRewards(EBFTTrainer):
    def compute_rewards(self, inputs, rollouts):
        gram, rewards = super().compute_rewards(inputs, rollouts)
        return gram, rewards._replace(total=rewards.total * (torch.nan if self.state.global_step == 1 else 1))


class HugeGradient(EBFTTrainer):
    """Loss and each gradient are finite, the gradient's norm is not."""

    def compute_policy_loss(self, *args):
        loss, metrics = super().compute_policy_loss(*args)
        return loss * (1e25 if self.state.global_step == 1 else 1), metrics


NOT_FINITE = {
    "weight": dict(callbacks=[PoisonedWeight()]),
    "rewards": dict(trainer_class=NaNRewards, settings=dict(advantage_estimator="none", whitening="none")),
    "gradient": dict(trainer_class=HugeGradient),
    "gradient_clipped": dict(trainer_class=HugeGradient, settings=dict(max_grad_norm=1.0)),
    "learning_rate": dict(settings=dict(learning_rate=1e30)),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_not_finite_stops_before_the_step(tmp_path, case):
    keywords = copy.copy(NOT_FINITE[case])
    settings = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=3, save_strategy="steps")
    settings |= dict(save_steps=1, whitening="paper") | keywords.pop("settings", {})
    model = small_model("llama", dtype=torch.float32)
    ours = trainer(model, ROWS, tmp_path, settings=settings, **keywords)
    with pytest.raises(FloatingPointError, match="Step 2 has loss .* before the optimiser's step") as error:
        ours.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    now = model.state_dict()
    if case == "weight":
        now["model.embed_tokens.weight"][7, 0] = saved["model.embed_tokens.weight"][7, 0]
    assert_equal_weights(now, saved)

    folder = tmp_path / "nonfinite_step_000002"
    assert str(folder) in str(error.value)
    tensors = load_file(folder / "rank_0.safetensors")
    for batch in (0, 1):
        rows = tensors[f"{batch}.input_ids"], tensors[f"{batch}.document_ids"]
        for ids, document in zip(*rows, strict=True):
            expected = ROWS[int(document)]["input_ids"]
            assert ids[: len(expected)].tolist() == expected
        assert {
            f"{batch}.{name}" for name in ("tokens", "rewards", "advantages", "doc_ids", "labels")
        } <= tensors.keys()
    if case == "rewards":
        assert tensors["0.advantages"].isnan().any()


# --- evaluation ---


@torch.no_grad()
def mean_cross_entropy(model, rows, answers):
    total = count = 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
        for p in range(1, len(ids)):
            if row["completion_mask"][p] or not answers:
                total, count = total - float(log_probs[p - 1, ids[p]]), count + 1
    return total / count


class Seen:
    """A user's compute_metrics that keeps what it is given."""

    def __call__(self, prediction):
        self.rollouts, self.references = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        return {"mine": 4.5}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Metrics, what compute_metrics saw, and the trainer, of one evaluation."""

    def evaluate(rows=HELD_OUT, model=None, **settings):
        seen = Seen()
        held_out = rows if isinstance(rows, dict) else Dataset.from_list(rows)
        model = small_model(scale=8.0) if model is None else model
        settings = dict(per_device_eval_batch_size=5, completion_only_loss=True) | settings
        folder = tmp_path_factory.mktemp("evaluation")
        ours = trainer(model, HELD_OUT, folder, settings=settings, eval_dataset=held_out, compute_metrics=seen)
        return ours.evaluate(), seen, ours

    return evaluate


@torch.no_grad()
def test_evaluation_is_the_oracles(evaluated):
    metrics, seen, ours = evaluated()
    model = small_model(scale=8.0)
    everything, answers = (mean_cross_entropy(model, HELD_OUT, only) for only in (False, True))
    assert everything != pytest.approx(answers, rel=1e-3)
    assert metrics["eval_ce_loss/all"] == pytest.approx(everything, rel=1e-6)
    assert metrics["eval_ce_loss/answer"] == pytest.approx(answers, rel=1e-6)
    assert metrics["eval_ce_loss"] == metrics["eval_loss"] == pytest.approx(answers, rel=1e-6)
    assert metrics["eval_mine"] == 4.5

    args, groups = ours.args, {}
    for document, row in enumerate(HELD_OUT):
        anchors = step_oracle.anchors(row, args, in_completion=True)
        assert (seen.references[document, len(anchors) :] == -100).all()
        assert (seen.rollouts[document, len(anchors) :] == -100).all()
        for k, anchor in enumerate(anchors):
            assert seen.references[document, k].tolist() == row["input_ids"][anchor : anchor + args.completion_length]
            groups[document, anchor] = [{"token_ids": tokens.tolist()} for tokens in seen.rollouts[document, k]]
    assert len(groups) > 5
    rows = [row | {"loss_mask": row["completion_mask"]} for row in HELD_OUT]
    expected = step_oracle.step_loss(model, model, model, rows, groups, args)
    for name in ("reward", "rewards/alignment/mean", "rewards/diversity/mean", "feature_matching_loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(expected[name]), rel=1e-6), name


@pytest.mark.parametrize(("size", "packing"), [(1, False), (2, True)])
def test_evaluation_does_not_depend_on_batches(evaluated, size, packing):
    settings = dict(per_device_eval_batch_size=size, packing=packing)
    (expected, *_), (metrics, *_) = evaluated(), evaluated(**settings)
    numbers = {k: v for k, v in expected.items() if not re.search("runtime|per_second|preparation", k)}
    assert "eval_reward_snr" in numbers
    assert {k: metrics[k] for k in numbers} == pytest.approx(numbers, rel=1e-9)


def test_evaluation_on_all_tokens(evaluated):
    metrics, *_ = evaluated(completion_only_loss=False)
    assert metrics["eval_ce_loss"] == metrics["eval_ce_loss/all"] != metrics["eval_ce_loss/answer"]


def test_several_evaluation_sets_and_without_rollouts(evaluated):
    sets = {"long": Dataset.from_list(HELD_OUT[3:]), "short": Dataset.from_list(HELD_OUT[2:3])}
    metrics, _, ours = evaluated(sets, rl_coef=0.0, ce_coef=1.0)
    assert {"eval_long_feature_matching_loss", "eval_long_reward", "eval_short_ce_loss"} <= metrics.keys()
    assert "eval_short_reward" not in metrics  # no document has a block
    assert metrics["eval_long_ce_loss"] == pytest.approx(mean_cross_entropy(ours.model, HELD_OUT[3:], answers=True))


def test_evaluation_before_and_during_training(tmp_path):
    settings = dict(max_steps=2, eval_on_start=True, eval_strategy="steps", eval_steps=1, beta=0.1)
    run = train(small_model(scale=8.0), ROWS, tmp_path, settings=settings, eval_dataset=Dataset.from_list(HELD_OUT))
    evaluations = [m for m in run.metrics if "eval_loss" in m]
    assert [m["step"] for m in evaluations] == [0, 1, 2]
    assert evaluations[0]["eval_kl"] == pytest.approx(0, abs=1e-9) and evaluations[2]["eval_kl"] > 0
    assert evaluations[0]["eval_ce_loss/all"] > evaluations[2]["eval_ce_loss/all"]


# --- schedules, data, override points ---


def test_coefficients_take_effect(tmp_path):
    settings = dict(max_steps=4, rl_coef=0.8, rl_warmup_steps=2, ce_coef=0.4, ce_decay="linear")
    run = train(small_model(), ROWS, tmp_path, settings=settings)
    for step, metrics in enumerate(run.metrics):
        rl, ce = 0.8 * min(1, (step + 1) / 3), 0.4 * (1 - step / 4)
        assert metrics["loss"] == pytest.approx(rl * metrics["policy_loss"] + ce * metrics["ce_loss"], rel=1e-6)
    assert len(run.metrics) == 4


@pytest.mark.parametrize("packing", [False, True])
def test_stream_equals_dataset(tmp_path, packing):
    rows = documents([23, 17, 5, 30, 6, 12, 21, 9])
    settings = dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, packing=packing)
    if packing:
        settings |= dict(max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    listed = train(small_model(), rows, tmp_path / "listed", settings=settings)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    streamed = train(small_model(), stream, tmp_path / "streamed", settings=settings)
    for before, expected, after in zip(listed.weights, listed.weights[1:], streamed.weights[1:], strict=False):
        assert relative_error(before, after, expected) < 1e-9
    without_epoch = [{k: v for k, v in m.items() if k != "epoch"} for m in streamed.metrics]
    assert without_epoch == [pytest.approx({k: v for k, v in m.items() if k != "epoch"}) for m in listed.metrics]


def test_end_of_a_stream_leaves_no_gradient_behind(tmp_path):
    """Two documents more than a step takes: they are left out, the next step starts over."""
    rows = documents([23, 17, 5, 30, 26, 12])
    settings = dict(
        max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4, logging_strategy="epoch"
    )
    whole = train(small_model(scale=8.0), rows[:4], tmp_path / "whole", settings=settings)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    streamed = train(small_model(scale=8.0), stream, tmp_path / "streamed", settings=settings)
    assert_equal_weights(streamed.weights[-1], whole.weights[-1])
    assert [m["loss"] for m in streamed.metrics] == [m["loss"] for m in whole.metrics]
    short = Dataset.from_list(rows[:3]).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset ended after 3 of the 4 micro-batches of one step: lower"):
        train(small_model(scale=8.0), short, tmp_path / "short", settings=settings)


def test_each_override_point_is_used(tmp_path):
    class Changed(EBFTTrainer):
        def sample(self, inputs, **purpose):
            rollouts = super().sample(inputs, **purpose)
            return rollouts._replace(tokens=torch.full_like(rollouts.tokens, 11))

        def compute_rewards(self, inputs, rollouts):
            gram, rewards = super().compute_rewards(inputs, rollouts)
            return gram, rewards._replace(total=torch.full_like(rewards.total, 3.5))

        def compute_advantages(self, experience):
            return torch.full_like(experience.rewards.total, -2.0)

        def compute_policy_loss(self, log_probs, advantages, layout, totals):
            _, metrics = super().compute_policy_loss(log_probs, advantages, layout, totals)
            return log_probs[layout.valid].mean(), metrics

    run = train(small_model(), ROWS, tmp_path, trainer_class=Changed, settings=dict(ce_coef=0.0))
    rows = [row for group in read_rollouts(tmp_path).values() for row in group]
    assert {(tuple(row["token_ids"]), row["reward"], row["advantage"]) for row in rows} == {((11,) * 3, 3.5, -2.0)}
    assert run.metrics[0]["loss"] == pytest.approx(run.metrics[0]["policy_loss"] / 2)


def test_bad_data_is_refused_before_weights_are_loaded(tmp_path):
    tokenizer = byte_bpe_tokenizer()
    small_model().config.save_pretrained(tmp_path / "model")  # a config, but no weights
    tokenizer.save_pretrained(tmp_path / "model")

    def start(rows, **settings):
        dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({"text": []})
        args = config(tmp_path / "run", **settings)
        EBFTTrainer(str(tmp_path / "model"), args, train_dataset=dataset)

    good = [{"text": "the quick brown fox jumps over the lazy dog"}]
    with pytest.raises(OSError, match="safetensors"):
        start(good)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        start([])
    with pytest.raises(ValueError, match=r"train_dataset has the columns \['txt'\]"):
        start([{"txt": "x"}])
    with pytest.raises(ValueError, match="train_dataset: all 1 documents are too short .* completion_length=3"):
        start([{"text": "a"}])
    with pytest.raises(ValueError, match="row 1: `text` is NoneType"):
        start([*good, {"text": None}])
    with pytest.raises(ValueError, match="train_dataset and eval_dataset are both missing"):
        EBFTTrainer(str(tmp_path / "model"), config(tmp_path / "run"))


# --- what a run leaves behind ---

KEYS = {
    *(
        "loss",
        "policy_loss",
        "ce_loss",
        "feature_matching_loss",
        "entropy",
        "kl",
        "grad_norm",
        "learning_rate",
        "epoch",
    ),
    *("reward", "reward_std", "reward_snr", "frac_reward_zero_std", "completions/duplicate_rate"),
    *("rewards/alignment/mean", "rewards/diversity/mean"),
    *("rewards/alignment_unwhitened/mean", "rewards/diversity_unwhitened/mean"),
    *("num_tokens", "documents_without_block"),
}


def test_metrics_and_files(tmp_path):
    settings = dict(max_steps=4, rollout_save_steps=2, beta=0.1)
    run = train(small_model(), ROWS, tmp_path, settings=settings)
    assert [m["step"] for m in run.metrics] == [1, 2, 3, 4]
    assert all(m.keys() == KEYS | {"step"} for m in run.metrics)
    assert all({"step_time", "tokens_per_second"} <= record.keys() for record in run.trainer.state.log_history[:-1])
    assert [m["num_tokens"] for m in run.metrics] == [93 * step for step in (1, 2, 3, 4)]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step_000001.parquet",
        "step_000002.parquet",
        "step_000004.parquet",
    ]
    resolved = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    fields = {k: v for k, v in resolved.items() if k in EBFTConfig.__dataclass_fields__}
    again, args = EBFTConfig(**fields), run.trainer.args
    different = {k for k in fields if getattr(again, k) != getattr(args, k)}
    assert not different
    card = (tmp_path / "README.md").read_text()
    assert "arXiv 2603.12248" in card and run.trainer.feature_network_record["sha256"] in card


def test_defaults_of_a_run(tmp_path):
    dataset = Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}])
    given = dict(train_dataset=dataset, processing_class=byte_bpe_tokenizer())
    settings = dict(use_cpu=True, max_length=128)
    plain = EBFTTrainer(small_model(), EBFTConfig(str(tmp_path), **settings), **given)
    assert plain.args.learning_rate == 1e-6
    assert plain.args.disable_tqdm is False
    assert any(isinstance(callback, ProgressCallback) for callback in plain.callback_handler.callbacks)
    adapted = EBFTTrainer(small_model(), EBFTConfig(str(tmp_path), **settings), peft_config=LoraConfig(), **given)
    assert adapted.args.learning_rate == 1e-5
    assert [plain.feature_network.pooling, plain.feature_network.norm] == ["last_token", "joint"]
    assert plain.feature_network.layer_indices == [1, 2, 3]


def test_final_model_and_checkpoint_load_in_plain_transformers(tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    run = train(small_model(dtype=torch.float32), ROWS, tmp_path, settings=settings)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        expected = run.trainer.model.eval()(ids).logits
        first, last = (AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{n}").eval() for n in (1, 2))
        assert torch.equal(last(ids).logits, expected)
        assert not torch.equal(first(ids).logits, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_card_tells_how_to_load_what_is_there(tmp_path, adapted):
    """After train() alone that is the last checkpoint, after save_model() the folder; peft's own card is replaced."""
    keywords = {"peft_config": LoraConfig()} if adapted else {}
    settings = dict(max_steps=1, save_strategy="steps", save_steps=1)
    run = train(small_model(dtype=torch.float32), ROWS, tmp_path, settings=settings, **keywords)
    card = (tmp_path / "README.md").read_text()
    assert f'from_pretrained("{tmp_path}/checkpoint-1")' in card
    run.trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = (folder / "README.md").read_text()
        assert f'from_pretrained("{folder}")' in card and "- ebft\n" in card
        assert ("AutoPeftModelForCausalLM" in card) == adapted
