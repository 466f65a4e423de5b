"""The experimental feature network that learns to tell references from rollouts: features, steps, state."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ebft import EBFTTrainer, FeatureNetwork, rewards
from ebft.feature_models import load_feature_network
from ebft.learned_features import SIZE, SMOOTHING, Classifier, LearnedFeatures, classification
from ebft.moving_average import FILE
from ragged import ragged_batch, random_tokens
from test_trainer_step import LORA
from tiny_models import tiny_model
from training import assert_equal_weights, config, documents, files, reseal, small_model, train

ROWS = documents([23, 17, 30, 12])
LEARNED = dict(feature_network="learned", feature_classifier_learning_rate=0.05)
SAVING = LEARNED | dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)


class Classifiers(TrainerCallback):
    """The classifier's weights before each step and after the last."""

    def __init__(self):
        self.history, self.features = [], None

    def _keep(self, *args, **kwargs):
        self.history.append(copy.deepcopy(self.features.classifier.state_dict()))

    on_step_begin = on_train_end = _keep


class Observed(EBFTTrainer):
    """Keeps what every step's rewards were made of."""

    def compute_rewards(self, inputs, rollouts):
        made = super().compute_rewards(inputs, rollouts)
        if self.feature_network.observe is not None:  # not in evaluation
            phi = self.feature_network.network(inputs["input_ids"], rollouts.tokens, inputs["layout"])
            self.__dict__.setdefault("seen", {}).setdefault(self.state.global_step, []).append(
                (*phi, inputs["layout"], made)
            )
        return made


def learning_run(folder, settings=SAVING, rows=ROWS, **keywords):
    watch = Classifiers()

    def watched(*args, **kwargs):
        trainer = Observed(*args, **kwargs)
        watch.features = trainer.feature_network
        return trainer

    model = small_model(dtype=torch.float64, scale=4.0)
    run = train(model, rows, folder, trainer_class=watched, settings=settings, callbacks=[watch], **keywords)
    run.classifiers = watch.history
    return run


def test_loss_and_accuracy_by_hand():
    real, made = torch.tensor([2.0, -0.5]), torch.tensor([[-1.0, 3.0, -2.0], [0.5, -0.1, -4.0]])
    loss, right = classification(real, made)
    for g in range(2):
        p, q = 1 / (1 + math.exp(-real[g])), [1 / (1 + math.exp(-x)) for x in made[g]]
        of_real = -(1 - SMOOTHING) * math.log(p) - SMOOTHING * math.log(1 - p)
        of_made = [-SMOOTHING * math.log(x) - (1 - SMOOTHING) * math.log(1 - x) for x in q]
        assert float(loss[g]) == pytest.approx((of_real + sum(of_made) / 3) / 2, rel=1e-5)
        told = [float(real[g] > 0)] * 3 + [float(x < 0) for x in made[g]]
        assert float(right[g]) == pytest.approx(sum(told) / 6)


def test_loss_is_bounded_below():
    """However sure the classifier is: unlike a feature-matching loss, which features of any length can raise."""
    entropy = -SMOOTHING * math.log(SMOOTHING) - (1 - SMOOTHING) * math.log(1 - SMOOTHING)
    for sure in (0.1, math.log((1 - SMOOTHING) / SMOOTHING), 10.0, 1e4):
        loss, _ = classification(torch.tensor([sure]), torch.full((1, 4), -sure))
        assert float(loss) >= entropy - 1e-6
    features = Classifier(8, 0, torch.float32).features(1e6 * torch.randn(5, 8))
    assert float(features.detach().norm(dim=-1).max()) <= 1 + 1e-6


@pytest.mark.parametrize("pooling", ["last_token", "token"])
def test_features(pooling):
    """Tanh of a linear map of the frozen features; zeros where there is no block; equal rollouts, equal bits."""
    input_ids, layout = ragged_batch()
    tokens = random_tokens(layout, len(input_ids), 4)
    tokens[:, :, 3] = tokens[:, :, 1]
    network = FeatureNetwork(tiny_model(dtype=torch.float32), pooling=pooling)
    learned = LearnedFeatures(network, network.size(tokens.shape[-1]), seed=3)
    generated, reference = learned(input_ids, tokens, layout)
    phi, phi_reference = network(input_ids, tokens, layout)
    weight, bias = learned.classifier.hidden.weight, learned.classifier.hidden.bias
    valid = layout.expand(len(input_ids))[1]
    assert not valid.all() and valid.any()
    for mine, theirs in ((generated, phi), (reference, phi_reference)):
        expected = torch.tanh(torch.einsum("...d,hd->...h", theirs, weight) + bias) / SIZE**0.5
        torch.testing.assert_close(mine[valid], expected[valid])
        assert not mine[~valid].any()
    assert torch.equal(generated[..., 3, :], generated[..., 1, :])
    torch.testing.assert_close(learned.references(input_ids, layout), reference)
    assert reference.shape[-1] == learned.size(99) == SIZE


def test_rewards_are_of_the_features_before_the_step_and_the_classifier_follows(tmp_path):
    """Step by step against autograd and Adam on all of a step's groups at once, whatever its micro-batches."""
    settings = LEARNED | dict(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run = learning_run(tmp_path, settings)
    assert set(run.trainer.seen) == {0, 1, 2} and all(len(batches) == 2 for batches in run.trainer.seen.values())
    oracle = Classifier(run.trainer.seen[0][0][0].shape[-1], 0, torch.float64)
    oracle.load_state_dict(run.classifiers[0])
    adam = torch.optim.Adam(oracle.parameters(), lr=0.05)
    for step, batches in sorted(run.trainer.seen.items()):
        assert_equal_to(run.classifiers[step], oracle)
        real, made = [], []
        for phi, phi_reference, layout, (_, found) in batches:
            valid = layout.expand(len(phi))[1]
            psi, psi_reference = (oracle.features(x[valid]).detach() for x in (phi, phi_reference))
            expected = rewards.feature_matching_rewards(psi, psi_reference, whitening=run.trainer.args.whitening)
            torch.testing.assert_close(found.total[valid], expected.total.to(found.total))
            real.append(phi_reference[valid])
            made.append(phi[valid])
        loss, right = classification(oracle(torch.cat(real)), oracle(torch.cat(made)))
        line = run.metrics[step]
        assert line["feature_classifier/loss"] == pytest.approx(float(loss.detach().mean()))
        assert line["feature_classifier/accuracy"] == pytest.approx(float(right.mean()))
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
    assert_equal_to(run.classifiers[3], oracle)
    assert not torch.equal(run.classifiers[3]["hidden.weight"], run.classifiers[0]["hidden.weight"])


def assert_equal_to(state, classifier):
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def test_it_learns(tmp_path):
    """Random rollouts of a random model are told from one repeated text before long."""
    rows = documents([24] * 4)
    settings = LEARNED | dict(max_steps=25, learning_rate=1e-6)
    lines = learning_run(tmp_path, settings, rows).metrics
    assert lines[0]["feature_classifier/accuracy"] < 0.8 < 0.9 < lines[24]["feature_classifier/accuracy"]
    assert lines[24]["feature_classifier/loss"] < lines[0]["feature_classifier/loss"]


def test_evaluation_teaches_nothing(tmp_path):
    from datasets import Dataset

    evaluated = SAVING | dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    held_out = Dataset.from_list(documents([9, 22, 14], seed=7))
    one = learning_run(tmp_path / "one", evaluated, eval_dataset=held_out)
    other = learning_run(tmp_path / "other")
    assert_equal_weights(one.weights[-1], other.weights[-1])
    assert_equal_weights(one.classifiers[-1], other.classifiers[-1])
    assert one.trainer.feature_network.observe is None
    found = [line for line in one.metrics if "eval_feature_matching_loss" in line]
    assert found and not any("eval_feature_classifier/loss" in line for line in found)


def test_classifier_is_part_of_a_checkpoint(tmp_path):
    """A resumed run ends in the same bits, its classifier and that one's optimiser too."""
    whole = learning_run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = load_file(checkpoint / FILE)
    assert all(torch.equal(saved[name], value) for name, value in whole.classifiers[2].items())
    rest = learning_run(tmp_path / "rest", resume=str(checkpoint))
    assert_equal_weights(rest.classifiers[-1], whole.classifiers[-1])
    assert_equal_weights(rest.weights[-1], whole.weights[-1])
    for name in ("checkpoint-4/" + FILE, *(f"rollouts/{n}" for n in files(tmp_path / "rest" / "rollouts", "*"))):
        assert (tmp_path / "rest" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    with pytest.raises(ValueError, match="was trained with the feature network"):
        train(small_model(dtype=torch.float64, scale=4.0), ROWS, tmp_path / "x", resume=str(checkpoint))
    (checkpoint / FILE).unlink()
    reseal(checkpoint)
    with pytest.raises(ValueError, match=f"has no {FILE}"):
        learning_run(tmp_path / "other", resume=str(checkpoint))


def test_resume_before_there_was_a_group(tmp_path):
    """The optimiser of a classifier that has learned nothing has no state."""
    settings = SAVING | dict(per_device_train_batch_size=1, save_steps=1, max_steps=2)
    rows = documents([5, 30])  # the first too short for a block
    whole = learning_run(tmp_path / "whole", settings, rows)
    rest = learning_run(tmp_path / "rest", settings, rows, resume=str(tmp_path / "whole" / "checkpoint-1"))
    assert_equal_weights(rest.classifiers[-1], whole.classifiers[-1])


@pytest.mark.parametrize(
    "settings", [dict(kernel="rbf"), dict(pooling="token"), dict(whitening="none", reuse_sampling_forward=True)]
)
def test_with_other_settings(tmp_path, settings):
    run = train(small_model(), ROWS, tmp_path, settings=LEARNED | dict(max_steps=2) | settings, peft_config=LORA)
    assert run.trainer.feature_network_record["learned"] == SIZE
    assert all(0 <= line["feature_classifier/accuracy"] <= 1 for line in run.metrics if "reward" in line)


def test_a_step_without_blocks_teaches_nothing(tmp_path):
    settings = LEARNED | dict(max_steps=2, per_device_train_batch_size=1)
    run = learning_run(tmp_path, settings, rows=documents([3, 23]))
    assert_equal_weights(run.classifiers[0], run.classifiers[1])
    assert not torch.equal(run.classifiers[1]["logit.weight"], run.classifiers[2]["logit.weight"])
    assert "feature_classifier/loss" not in run.metrics[0]


def test_first_weights_are_a_function_of_the_seed(tmp_path):
    policy = tiny_model(dtype=torch.float32)
    state = torch.get_rng_state()
    one, same, other = (load_feature_network(policy, config(tmp_path, seed=s, **LEARNED)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_weights(one.classifier.state_dict(), same.classifier.state_dict())
    assert not torch.equal(one.classifier.hidden.weight, other.classifier.hidden.weight)
    values = one.classifier.hidden(torch.nn.functional.normalize(torch.randn(9, one.network.size(3)), dim=-1))
    assert 0.5 < float(values.detach().std()) < 2  # neither all linear nor all flat


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LEARNED | dict(feature_classifier_learning_rate=0.0), "learning_rate=0.0 must be above 0 and finite"),
        (dict(feature_classifier_learning_rate=0.1), "learning_rate=0.1 does nothing with feature_network='pretr"),
        (LEARNED | dict(feature_norm="none"), "feature_norm='none' with feature_network='learned'"),
    ],
)
def test_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_features_are_not_rounded_by_autocast():
    features = Classifier(6, 0, torch.float32)
    phi = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = features.features(phi)
    assert torch.equal(rounded, features.features(phi))
