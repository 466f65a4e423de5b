"""The recipes of the paper: their data are prepared, every value is the paper's, and `ebft plan` takes them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.shapes import model_config
from ebft.cli import main
from tiny import byte_bpe_tokenizer

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "paper"
MODELS = {
    "qa_coding": ("Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"),
    "unstructured_code": ("Qwen2.5-1.5B",),
    "translation": ("Llama-3.2-1B",),
}
OF_ALL = {
    **{"max_length": 1024, "packing": True, "document_masking": False, "num_generations": 4, "temperature": 0.6},
    **{"top_p": 1.0, "whitening": "released", "beta": 0.0, "learning_rate": 1e-6},
    **{"lr_scheduler_type": "constant_with_warmup", "num_train_epochs": 2.0, "bf16": True},
}
BLOCKS = {  # completion_length, stride, context_length, pooling
    "qa_coding": (8, 8, 8, "last_token"),
    "unstructured_code": (8, 8, 8, "last_token"),
    "translation": (4, 2, 4, "mean_pooling"),
}
ANSWER = {
    "id": 1,
    "input": 'Write add(a, b); mind the """quotes""" and \\n.',
    "output": "So:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
    "unit_tests": json.dumps(["\nassert add(1, 2) == 3\n", "assert add(0, 0) == 0"]),
}
SOURCES = {
    "qa_coding": [ANSWER, {**ANSWER, "id": 2, "output": "I cannot do that."}] * 60,
    "unstructured_code": [{"text": f"def f{i}(x):\n    return x + {i}\n" * 20} for i in range(60)] + [{"text": " "}],
    "translation": [{"translation": {"de": f"Das sind {i} Wege.", "en": f"These are {i} ways."}} for i in range(60)],
}


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", RECIPES / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepared(prepare, tmp_path, monkeypatch):
    """Prepares a task's data from a local file, in the working directory, and reads them back."""
    monkeypatch.chdir(tmp_path)

    def run(task: str, *words: str) -> dict[str, list[dict]]:
        Path("source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SOURCES[task]))
        words = ("prepare.py", task, "--source", "source.jsonl", "--validation", "8", *words)
        monkeypatch.setattr(sys, "argv", list(words))
        prepare.main()
        folder = Path("data") / task
        return {path.stem: list(map(json.loads, path.open())) for path in folder.glob("*.jsonl")}

    return run


@pytest.mark.parametrize(("task", "model"), [(task, model) for task, models in MODELS.items() for model in models])
def test_the_plan_takes_it_with_the_values_of_the_paper(task, model, prepared, capsys):
    byte_bpe_tokenizer().save_pretrained(model)
    model_config(model, longest=32768).save_pretrained(model)
    prepared(task, "--rows", "50")
    capsys.readouterr()
    planned = ["--model_name_or_path", model, "--use_cpu", "--memory", "80", "--flops", "4e14", "--json"]
    assert main(["plan", "--config", str(RECIPES / f"{task}.yaml"), *planned]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    found = plan["settings"]
    assert {name: found[name] for name in OF_ALL} == OF_ALL
    assert found["anchors"] == "all"
    names = ("completion_length", "stride", "context_length", "pooling")
    assert tuple(found[name] for name in names) == BLOCKS[task]
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize("task", MODELS)
def test_recipe_names_the_paper_s_model_and_the_prepared_files(task):
    recipe = yaml.safe_load((RECIPES / f"{task}.yaml").read_text())
    assert recipe["model_name_or_path"].endswith(MODELS[task][0])
    assert recipe["dataset_name"] == f"data/{task}/train.jsonl"
    assert (recipe["adam_beta1"], recipe["adam_beta2"], recipe["max_grad_norm"]) == (0.9, 0.95, 1.0)
    assert (recipe["warmup_steps"], recipe["weight_decay"]) == (0.03, 0.0)


def test_questions_become_programs_that_their_tests_can_run(prepared):
    rows = prepared("qa_coding")
    assert (len(rows["validation"]), len(rows["train"])) == (8, 52)  # those without code are left out
    row = rows["train"][0]
    exec(row["prompt"] + row["completion"] + row["tests"], {})
    assert "'''quotes''' and \\n" in row["prompt"]
    assert "Done" not in row["completion"]


def test_both_directions_with_the_prompts_of_evaluation(prepared):
    rows = prepared("translation")["train"]
    assert {row["direction"] for row in rows} == {"de-en", "en-de"}
    assert rows[0]["prompt"].startswith("Translate this from ")
    assert all(row["completion"] == " " + row["references"][0] for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows) == 112


def test_so_many_tokens_of_code(prepared):
    byte_bpe_tokenizer().save_pretrained("tokenizer")
    rows = prepared("unstructured_code", "--tokens", "2000", "--tokenizer", "tokenizer")["train"]
    lengths = [len(byte_bpe_tokenizer()(row["text"])["input_ids"]) + 1 for row in rows]
    assert sum(lengths[:-1]) < 2000 <= sum(lengths)


def test_what_cannot_be_prepared_is_told(prepared, prepare, monkeypatch):
    with pytest.raises(SystemExit, match="no row is left to train on"):
        prepared("translation", "--validation", "200")
    for words, message in (
        (["qa_coding", "--source", "source.jsonl"], "has no column 'id', only"),
        (["qa_coding", "--source", "absent.jsonl"], "--source absent.jsonl: there is no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
        with pytest.raises(SystemExit, match=message):
            prepare.main()
