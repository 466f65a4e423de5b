"""Feature networks other than the pretrained model: one that was never trained, and the policy's moving average."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import step_oracle
from ebft import FeatureNetwork
from ebft.feature_models import load_feature_network, weights_hash
from ebft.models import load_policy
from ebft.moving_average import FILE
from test_trainer_step import LORA, PROMPTED, oracle_documents
from tiny_models import tiny_model
from training import config, documents, files, read_rollouts, relative_error, reseal, small_model, train

ROWS = documents([23, 17, 30, 12])
SAVING = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)


class Averages(TrainerCallback):
    """What the feature network's weights are before each step and after the last."""

    def __init__(self):
        self.history, self.trainer = [], None

    def _keep(self, *args, **kwargs):
        network = self.trainer.feature_network.decoder
        self.history.append({name: p.detach().clone() for name, p in network.named_parameters()})

    on_step_begin = on_train_end = _keep


def run_with_averages(folder, model=None, settings=None, **keywords):
    watch = Averages()

    def watched(*args, **kwargs):
        from ebft import EBFTTrainer

        watch.trainer = EBFTTrainer(*args, **kwargs)
        return watch.trainer

    options = dict(feature_network="ema", feature_ema_decay=0.7) | (settings or {})
    model = small_model(dtype=torch.float64, scale=4.0) if model is None else model
    run = train(model, ROWS, folder, trainer_class=watched, settings=options, callbacks=[watch], **keywords)
    run.averages = watch.history
    return run


def test_average_follows_the_policy(tmp_path):
    """By its formula, step by step, from the policy's first weights on; and it is what the rewards are made with."""
    run = run_with_averages(tmp_path, settings=dict(max_steps=3))
    decoder = {name.removeprefix("model."): value for name, value in run.weights[0].items()}
    expected = {name: decoder[name].clone() for name in run.averages[0]}
    for step, found in enumerate(run.averages):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
        if step < 3:
            after = run.weights[step + 1]
            expected = {name: 0.7 * value + 0.3 * after[f"model.{name}"] for name, value in expected.items()}
    assert not torch.equal(
        run.averages[0]["layers.0.mlp.up_proj.weight"], run.averages[3]["layers.0.mlp.up_proj.weight"]
    )

    policy = small_model(dtype=torch.float64, scale=4.0)
    initial, phi = copy.deepcopy(policy), copy.deepcopy(policy)
    policy.load_state_dict(run.weights[2])
    phi.load_state_dict({f"model.{name}": value for name, value in run.averages[2].items()}, strict=False)
    groups, args = read_rollouts(tmp_path, 3), run.trainer.args
    loss = step_oracle.step_loss(policy, initial, phi, oracle_documents(ROWS), groups, args)["loss"]
    after = step_oracle.sgd_step(policy, loss, args.learning_rate)
    assert relative_error(run.weights[2], run.weights[3], after) < 1e-5


def test_average_is_part_of_a_checkpoint(tmp_path):
    """A resumed run ends in the same bits, its feature network too."""
    whole = run_with_averages(tmp_path / "whole", settings=SAVING)
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / FILE)
    assert all(torch.equal(saved[name], value) for name, value in whole.averages[2].items())
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    rest = run_with_averages(tmp_path / "rest", settings=SAVING, resume=str(checkpoint))
    for name, value in whole.averages[-1].items():
        assert torch.equal(rest.averages[-1][name], value), name
    for name, value in whole.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], value), name
    for name, content in files(tmp_path / "rest" / "rollouts", "*").items():
        assert (tmp_path / "whole" / "rollouts" / name).read_bytes() == content

    for other in (dict(feature_network="pretrained"), dict(feature_network="ema", feature_ema_decay=0.9)):
        model = small_model(dtype=torch.float64, scale=4.0)
        with pytest.raises(ValueError, match="was trained with the feature network .*'ema': '0.7'"):
            train(model, ROWS, tmp_path / "x", settings=SAVING | other, resume=str(checkpoint))
    (checkpoint / FILE).unlink()
    reseal(checkpoint)
    with pytest.raises(ValueError, match=f"has no {FILE}"):
        run_with_averages(tmp_path / "other", settings=SAVING, resume=str(checkpoint))


def test_untrained_network(tmp_path):
    """Of the policy's shape and of no weights of it, a function of the seed; the global noise is left alone."""
    policy = load_policy(tiny_model(dtype=torch.float32), config(tmp_path))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (
        load_feature_network(policy, config(tmp_path, feature_network="random", seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)
    theirs = dict(policy.model.named_parameters())
    shapes = {name: p.shape for name, p in one.decoder.named_parameters()}
    assert shapes == {name: theirs[name].shape for name in shapes}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    assert matrices and not any(torch.equal(dict(one.decoder.named_parameters())[n], theirs[n]) for n in matrices)
    assert not any(p.requires_grad for p in one.decoder.parameters())


def test_training_with_an_untrained_network(tmp_path):
    """Also beside an adapter, whose base would else be the network; recorded, so that a resume can tell."""
    settings = dict(feature_network="random", max_steps=2)
    run = train(small_model(), PROMPTED, tmp_path, settings=settings, peft_config=LORA)
    record = run.trainer.feature_network_record
    assert record["name"].endswith("untrained, seed 42") and run.trainer.feature_network.model is not run.trainer.model
    assert run.metrics[0]["feature_matching_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(feature_network="emma"), "feature_network='emma' is unknown: use one of pretrained, random, ema"),
        (dict(feature_network="ema", feature_ema_decay=1.0), r"feature_ema_decay=1.0 must be in \(0, 1\)"),
        (dict(feature_ema_decay=0.5), "feature_ema_decay=0.5 does nothing with feature_network='pretrained'"),
        (dict(feature_network="ema", feature_model_name_or_path="x"), "feature_model_name_or_path='x' with"),
        (dict(feature_network="ema", kernel="ngram"), "feature_network='ema' does nothing with kernel='ngram'"),
    ],
)
def test_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_average_of_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="feature_network='ema' averages trained weights, and an adapter's base"):
        train(small_model(), ROWS, tmp_path, settings=dict(feature_network="ema"), peft_config=LORA)


@pytest.mark.parametrize("kind", ["ema", "random"])
def test_a_given_network_is_not_ignored(tmp_path, kind):
    """Nor is what is asked to be done with it."""
    given = FeatureNetwork(small_model())
    with pytest.raises(ValueError, match=f"feature_model .*feature_network='{kind}'"):
        train(small_model(), ROWS, tmp_path, settings=dict(feature_network=kind), feature_model=given)
