"""Tasks of lm-evaluation-harness on a saved checkpoint; the run itself only where the harness is installed."""

import importlib.util
import math
import os

import pytest

from ebft.evaluation.harness import TaskScore, check_loadable, expand_tasks, run_tasks, scores_of, task_digest
from stand_ins import TASK_ROWS, harness_or_stand_in, own_task
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model


def test_every_metric_with_its_error():
    results = {
        "gsm": {
            "alias": "gsm",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "words": {"alias": " - words", "acc,none": 0.5, "acc_stderr,none": math.nan, "sample_len": 12},
        "text": {"perplexity,none": 12.5, "bleu,none": 3.0},
    }
    gsm = [
        {"doc_id": i, "filter": name, "exact_match": float(i in right)}
        for name, right in (("strict-match", (2,)), ("flexible-extract", (1, 2)))
        for i in (3, 1, 0, 2)
    ]
    samples = {
        "gsm": gsm,
        "words": [{"doc_id": i, "filter": "none", "acc": i == 1} for i in range(2)],
        "text": [{"doc_id": 0, "filter": "none", "perplexity": 2.0, "bleu": ("a", "b")}],
    }
    assert scores_of(results, samples) == [
        TaskScore("gsm", "exact_match,strict-match", 0.25, 0.1, [0, 0, 1, 0]),
        TaskScore("gsm", "exact_match,flexible-extract", 0.5, None, [0, 1, 1, 0]),
        TaskScore("words", "acc", 0.5, None, [0, 1]),
        TaskScore("text", "perplexity", 12.5, None, None),
        TaskScore("text", "bleu", 3.0, None, None),
    ]
    assert scores_of(results, {})[0].values is None, "a group has no examples of its own"


def test_no_tasks():
    with pytest.raises(ValueError, match="tasks is empty"):
        run_tasks("model", [])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_message_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"needs lm_eval, which is not installed: pip install 'ebft\[lm-eval\]'"):
        run_tasks("model", ["hellaswag"])


@pytest.fixture
def tasks_of_a_folder(tmp_path):
    """Five tasks and a group of two of them, for the harness or what stands in for it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = own_task(folder).read_text()
    for name, more in (("ours_a", ""), ("ours_b", ""), ("ours_code", "unsafe_code: true\n")):
        (folder / f"{name}.yaml").write_text(text.replace("task: ours", f"task: {name}") + more)
    lost = text.replace("task: ours", "task: lost").replace("rows.json", "nosuch.json")
    (folder / "lost.yaml").write_text(lost)
    (folder / "all.yaml").write_text("group: ours_all\ntask: [ours_a, ours_b]\n")
    with harness_or_stand_in(tmp_path / "site"):
        yield folder


def test_patterns_are_written_out_as_tasks(tasks_of_a_folder):
    """Not as groups, whose tasks would be run a second time; a group that is named stays."""
    assert expand_tasks(["ours_?", "ours_a", "ours_*"], tasks_of_a_folder) == ["ours_a", "ours_b", "ours_code"]
    assert expand_tasks(["ours_all"], tasks_of_a_folder) == ["ours_all"]
    path = str(tasks_of_a_folder / "ours.yaml")
    assert expand_tasks([path], tasks_of_a_folder) == [path]
    with pytest.raises(ValueError, match=r"'ours_al\*' matches only groups of tasks: name \['ours_all'\] in full"):
        expand_tasks(["ours_al*"], tasks_of_a_folder)
    with pytest.raises(ValueError, match=r"does not know \['nosuch_\*'\]"):
        expand_tasks(["nosuch_*"], tasks_of_a_folder)


def test_a_task_that_cannot_be_run_is_found_before_any_work(tasks_of_a_folder, tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    check_loadable("ours", tasks_of_a_folder)
    check_loadable(str(tasks_of_a_folder / "ours.yaml"), tasks_of_a_folder)
    with pytest.raises(ValueError, match=r"tasks: 'lost' cannot be loaded \((?s:.)*nosuch\.json"):
        check_loadable("lost", tasks_of_a_folder)
    with pytest.raises(ValueError, match=r"tasks: \['ours_code'\] run generated code on this machine"):
        check_loadable("ours_code", tasks_of_a_folder)


def test_the_digest_of_a_task_is_of_what_it_reads(tmp_path):
    """Of included YAMLs, functions and data too; not of a neighbour, nor of when a file was written."""
    task = own_task(tmp_path)
    task.write_text("include: base.yml\n" + task.read_text() + "process_docs: !function tools.docs\n")
    (tmp_path / "base.yml").write_text("description: one\n")
    (tmp_path / "tools.py").write_text("def docs(rows):\n    return rows\n")
    seen = [task_digest(task)]
    (tmp_path / "neighbour.yaml").write_text("task: another\n")
    os.utime(tmp_path / "rows.json", (1, 1))
    assert task_digest(task) == seen[0]
    for name, text in (("base.yml", "description: two\n"), ("tools.py", "docs = list\n"), ("rows.json", "[]")):
        (tmp_path / name).write_text(text)
        seen.append(task_digest(task))
    assert len(set(seen)) == 4
    task.write_text("task: 'ours\n")
    with pytest.raises(ValueError, match=r"ours\.yaml:\d+: not valid YAML"):
        task_digest(task)


def test_a_task_of_our_own(tmp_path, monkeypatch):
    """The share of right choices is that of the model's own log-probabilities."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `lm-eval`)")
    import datasets.config
    import torch

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = byte_bpe_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), scale=3.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    own_task(tmp_path)

    def log_prob(context, choice):
        start, ids = len(tokenizer(context).input_ids), torch.tensor([tokenizer(context + choice).input_ids])
        logs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logs[start - 1 :].sum().item()

    right = [log_prob(row["context"], " dog") > log_prob(row["context"], " fox") for row in TASK_ROWS]
    (score,) = run_tasks(tmp_path / "model", ["ours"], include_path=tmp_path, batch_size=2, device="cpu")
    assert (score.task, score.metric, score.value) == ("ours", "acc", pytest.approx(sum(right) / 3))
    assert score.values == right
    assert expand_tasks(["our*", "ours"], include_path=tmp_path) == ["ours"]
    with pytest.raises(ValueError, match=r"does not know \['nosuch'\]"):
        run_tasks(tmp_path / "model", ["nosuch"], include_path=tmp_path)
