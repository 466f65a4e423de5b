"""Tasks of lm-evaluation-harness on a saved checkpoint; the run itself only where the harness is installed."""

import importlib.util
import math

import pytest

from ebft.evaluation.harness import TaskScore, expand_tasks, run_tasks, scores_of
from stand_ins import TASK_ROWS, own_task
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
    with pytest.raises(ImportError, match=r"pip install 'ebft\[lm-eval\]'"):
        run_tasks("model", ["hellaswag"])


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
