"""No secret of the environment or the options is in a file that is written, in a report, or in an error's message."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from ebft import EBFTConfig
from ebft.cli import main
from ebft.compare.config import CompareConfig
from ebft.credentials import hidden, is_secret
from ebft.evaluation.config import EvaluationConfig
from planted import SECRET, files_with_secret, plant
from report_folders import make_run
from tiny import byte_bpe_tokenizer
from training import documents, small_model, train

URL = f"https://user:{SECRET}@example.org/data.jsonl"


@pytest.mark.parametrize("name", ["hub_token", "token", "HF_TOKEN", "WANDB_API_KEY", "password", "aws_secret"])
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["eos_token", "num_tokens", "tokenizer", "label_key", "pooling", "token_ids"])
def test_names_of_no_secrets(name):
    assert not is_secret(name)


def test_what_is_hidden():
    shown = hidden({"a": [{"token": "x"}], "b": URL, "c": {"eos_token": "</s>"}, "hub_token": None, "d": 1})
    assert shown == {
        "a": [{"token": "(hidden)"}],
        "b": "https://example.org/data.jsonl",
        "c": {"eos_token": "</s>"},
        "hub_token": None,
        "d": 1,
    }


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (dict(model_init_kwargs={"token": SECRET}), "model_init_kwargs.token"),
        (dict(model_init_kwargs={"hub": {"use_auth_token": SECRET}}), "model_init_kwargs.hub.use_auth_token"),
        (dict(feature_model_name_or_path=URL), "feature_model_name_or_path"),
        (dict(run_name=URL), "run_name"),
    ],
)
def test_secret_settings_are_refused(tmp_path, settings, place):
    with pytest.raises(ValueError, match=f"^{place}: .* would be written into files") as caught:
        EBFTConfig(str(tmp_path), use_cpu=True, **settings)
    assert SECRET not in str(caught.value)


def test_secret_settings_of_evaluations_and_comparisons_are_refused():
    with pytest.raises(ValueError, match="^dataset_name: the password in its URL") as caught:
        EvaluationConfig(model_name_or_path=["m"], dataset_name=URL)
    assert SECRET not in str(caught.value)
    for train_options in ({"hub_token": SECRET}, {"env": {"HF_TOKEN": SECRET}}):
        with pytest.raises(ValueError, match=r"^train\..*: a token or password would") as caught:
            CompareConfig("m", "d", {"sft": {}}, train=train_options, documents=1, validation={"a": 1}, test={"b": 1})
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "recipe",
    [
        f"dataset_name: {URL}\n",
        f"model_revision: {URL}\n",
        f"model_init_kwargs: {{token: {SECRET}}}\n",
        f"hub_token: [{SECRET}\n",  # no YAML
        f"hub_token: [{SECRET}]\n",
        f"hub_token: {{token: {SECRET}}}\n",
        f"model_init_kwargs: 'token={SECRET}'\n",
        f"env: {SECRET}\n",
    ],
)
def test_errors_do_not_repeat_secrets(tmp_path, capfd, recipe):
    (tmp_path / "r.yaml").write_text(recipe + "model_name_or_path: nowhere/such\n" * ("[" not in recipe))
    assert main(["train", "--config", str(tmp_path / "r.yaml"), "--dataset_name", "x.jsonl"]) == 2
    printed = "".join(capfd.readouterr())
    assert "error: " in printed and SECRET not in printed


@pytest.mark.parametrize("method", ["ebft", "sft"])
def test_files_of_a_run_and_of_its_report_hold_no_secret(tmp_path, monkeypatch, method):
    plant(monkeypatch)
    small_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    byte_bpe_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"The number {i} is followed by the number {i + 1}."} for i in range(4)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "my.jsonl")]
    words += ["--output_dir", str(run), "--max_steps", "1", "--save_steps", "1", "--use_cpu", "--max_length", "32"]
    assert main(["train", *words, "--method", method, "--hub_token", SECRET, "--eval_split_size", "1"]) == 0
    if find_spec("plotly"):
        assert main(["report", str(run)]) == 0
    assert files_with_secret(run) == []
    (run / "planted").write_text(SECRET)
    assert files_with_secret(run) == ["planted"]


def test_a_token_given_in_python_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    settings = dict(hub_token=SECRET, save_strategy="steps", save_steps=1)
    train(small_model(), documents([30] * 4), tmp_path, settings=settings).trainer.save_model()
    assert files_with_secret(tmp_path) == []
    assert os.environ["HF_TOKEN"] == SECRET


def test_report_of_a_run_with_secrets_hides_them(tmp_path):
    pytest.importorskip("plotly")
    run = make_run(tmp_path / "run", settings={"hub_token": SECRET, "dataset_name": URL})
    assert SECRET in (run / "resolved_config.yaml").read_text()
    (tmp_path / "shown").mkdir()
    assert main(["report", str(run), "--output_file", str(tmp_path / "shown" / "report.html")]) == 0
    assert files_with_secret(tmp_path / "shown") == []


def test_report_does_not_follow_links_out_of_a_run(tmp_path):
    pytest.importorskip("plotly")
    run, page = make_run(tmp_path / "run"), tmp_path / "shown" / "report.html"
    page.parent.mkdir()
    outside = tmp_path / "outside.yaml"
    outside.write_text(yaml.safe_dump({"mine": SECRET}))
    for name in ("resolved_config.yaml", "metrics.jsonl"):
        (run / name).unlink()
        (run / name).symlink_to(outside)
    lines = tmp_path / "outside.jsonl"
    lines.write_text(json.dumps({"step": 1, SECRET: 1.0}) + "\n")
    (run / "timing.jsonl").unlink()
    (run / "timing.jsonl").symlink_to(lines)
    assert main(["report", str(run), "--output_file", str(page)]) == 0
    assert files_with_secret(Path(page).parent) == []
