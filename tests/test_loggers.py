"""W&B, TensorBoard and Trackio get our metrics under our names; with stand-ins for the packages, not the packages."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from datasets import Dataset

from ebft import EBFTConfig
from planted import SECRET
from training import documents, small_model, train


def stand_in(monkeypatch, name: str, **attributes) -> ModuleType:
    """A module that looks installed."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Settings(dict):
    """What the packages call `config`."""

    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def logged(monkeypatch):
    """Logger -> name -> values, and what each was told of the settings; for all three."""
    found = {name: {} for name in ("wandb", "tensorboard", "trackio")}
    settings = {name: Settings() for name in found}

    def log_into(logger):
        def log(values):
            for name, value in values.items():
                found[logger].setdefault(name, []).append(value)

        return log

    run = SimpleNamespace(summary={}, _label=lambda **_: None, id="1", name="n", url="u")
    common = {"init": lambda **_: None, "finish": lambda: None}
    stand_in(monkeypatch, "wandb", **common, run=run, config=settings["wandb"], log=log_into("wandb"))
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "wandb.sdk.lib.config_util", ConfigError=ValueError)
    space = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    extra = {"config": settings["trackio"], "log": log_into("trackio"), "context_vars": space}
    stand_in(monkeypatch, "trackio", **common, **extra, __version__="1.0")

    class SummaryWriter:
        def __init__(self, log_dir=None):
            self.flush = self.close = lambda: None

        def add_scalar(self, name, value, step):
            log_into("tensorboard")({name: value})

        def add_text(self, name, text, step=None):
            settings["tensorboard"][name] = text

    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "tensorboardX", SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # it would import more of the package
    return SimpleNamespace(values=found, settings=settings)


def test_metrics_arrive_under_our_names(tmp_path, logged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    settings = dict(report_to=list(logged.values), max_steps=2, eval_strategy="steps", eval_steps=2, hub_token=SECRET)
    evaluation = Dataset.from_list(documents([24, 28], seed=1))
    run = train(small_model(), documents([30] * 4), tmp_path, settings=settings, eval_dataset=evaluation)
    steps = [record for record in run.metrics if "loss" in record]
    (evaluated,) = (record for record in run.metrics if "eval_loss" in record)
    assert len(steps) == 2
    for values in logged.values.values():
        for name in ("reward", "feature_matching_loss", "rewards/alignment/mean", "entropy", "num_tokens"):
            assert values[f"train/{name}"] == [record[name] for record in steps]
        for name in ("feature_matching_loss", "ce_loss", "loss"):
            assert values[f"eval/{name}"] == [evaluated[f"eval_{name}"]]
    for told in logged.settings.values():
        assert "num_generations" in str(told) and SECRET not in str(told)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_logger_that_is_missing_is_said_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr("ebft.config_checks.get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=rf"report_to='{name}' is not installed: pip install 'ebft\[{name}\]'"):
        EBFTConfig(str(tmp_path), use_cpu=True, report_to=name)


def test_an_unknown_logger_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="report_to='tensorbord' is unknown: did you mean tensorboard"):
        EBFTConfig(str(tmp_path), use_cpu=True, report_to=["tensorbord"])
