"""The card says data, method, settings and results in metadata that the Hub takes, and is pushed with the model."""

import json
import shutil

import pytest
import yaml
from datasets import Dataset

from ebft.checkpoints import DELETING, REPLACED, SUPERSEDED
from ebft.model_card import add_results, is_on_hub, write_model_card
from hub_server import hub
from planted import SECRET
from training import documents, small_model, train

PUSHING = dict(push_to_hub=True, hub_model_id="ours/tiny", hub_strategy="end", hub_token=SECRET)
EVALUATING = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)


def parts(text: str) -> tuple[dict, str]:
    """Metadata and body of a card."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A run that was pushed: what the Hub has, and the trainer."""
    folder, rows = tmp_path_factory.mktemp("pushed"), documents([30] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "another")
        with hub(patch) as server:
            evaluation = Dataset.from_list(documents([24, 28], seed=1))
            run = train(small_model(), rows, folder, settings=PUSHING | EVALUATING, eval_dataset=evaluation)
            for kind in (SUPERSEDED, REPLACED, DELETING, ""):
                (folder / f"{kind}checkpoint-9").mkdir()
                (folder / f"{kind}checkpoint-9" / "optimizer.pt").touch()
            run.trainer.base_name = "some/model"
            run.trainer.push_to_hub(dataset_name="some/data")
    return server, run


def test_push_uploads_the_model_and_its_card(pushed):
    server, run = pushed
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "resolved_config.yaml"} <= set(
        server.files
    )
    assert server.files["model.safetensors"] == (run.folder / "model.safetensors").read_bytes()
    assert not [name for name in server.files if "checkpoint-" in name]
    assert server.tokens == {f"Bearer {SECRET}"}
    assert not [name for name, content in server.files.items() if SECRET.encode() in content]
    assert server.cards == [server.files["README.md"].decode()], "the card that the Hub was asked about"


def test_pushed_card_says_data_method_settings_and_results(pushed):
    server, run = pushed
    metadata, body = parts(server.files["README.md"].decode())
    assert metadata["base_model"] == "some/model" and metadata["datasets"] == ["some/data"]
    assert metadata["library_name"] == "transformers" and "ebft" in metadata["tags"]
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    logged = next(record for record in reversed(run.metrics) if "eval_loss" in record)
    assert values["feature_matching_loss"] == logged["eval_feature_matching_loss"]
    assert set(values) == {k.removeprefix("eval_") for k in logged if k.startswith("eval_")}
    assert 'from_pretrained("ours/tiny")' in body
    assert "arXiv 2603.12248" in body and "num_generations: 3" in body and "some/data" in body


@pytest.mark.parametrize("name", ["some/model", "gpt2"])
def test_names_on_the_hub(name):
    assert is_on_hub(name)


@pytest.mark.parametrize("name", [None, "", "/models/mine", "../mine", "runs/a/b", "a model: with colon"])
def test_names_that_the_hub_would_refuse(name, tmp_path):
    write_model_card(
        tmp_path,
        name=None,
        base=name,
        dataset=name,
        feature_network=None,
        kernel=None,
        history=[],
        settings={},
        adapter=False,
    )
    metadata, _ = parts((tmp_path / "README.md").read_text())
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}


def test_results_of_an_evaluation_are_added(pushed, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pushed[1].folder, model, ignore=shutil.ignore_patterns("rollouts"))
    rows = [
        {"model": "model", "measure": "perplexity/all", "length": None, "mean": 2.5},
        {"model": "model", "measure": "feature_matching_loss", "length": 8, "mean": 0.5},
        {"model": "model", "measure": "infinite", "length": None, "mean": None},
        {"model": "other", "measure": "perplexity/all", "length": None, "mean": 3.5},
    ]
    config = {"dataset_name": "held_out.jsonl", "code_benchmark": ["humaneval.jsonl"], "tasks": []}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"models": {"model": str(model), "other": "x"}, "config": config, "results": rows}))
    before = parts((model / "README.md").read_text())[1]
    assert add_results(model, results) == 2
    metadata, body = parts((model / "README.md").read_text())
    (result,) = metadata["model-index"][0]["results"]
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [
        ("perplexity/all", 2.5),
        ("feature_matching_loss@8", 0.5),
    ]
    assert result["dataset"]["name"] == "held_out.jsonl, humaneval.jsonl" and body == before
    with pytest.raises(ValueError, match=r"results\.json: of .*, not of "):
        add_results(pushed[1].folder, results)
    with pytest.raises(ValueError, match="give a model with a card"):
        add_results(tmp_path, results)
