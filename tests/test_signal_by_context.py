"""Signal by context: the contexts are cut where blocks stand, and the bins say what their members say."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.signal_by_context import by_probability, contexts_of, log_prob, main, measure
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model


@pytest.fixture
def model(tmp_path):
    """A tiny checkpoint."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("qwen2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def words(tmp_path, model):
    """Options of a training on twelve prompts."""
    rows = [{"prompt": f"Count from {i}: ", "completion": ", ".join(map(str, range(i, i + 9)))} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data.jsonl")
    return ["--model_name_or_path", model, "--dataset_name", data, "--use_cpu", "--max_length", "64"]


def test_contexts_end_with_a_block_of_the_answer(model, words):
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = contexts_of(model, words, 6)
    assert len(found) == 6
    assert len({tokenizer.decode(context["input_ids"]).split(":")[0] for context in found}) == 6  # documents
    for context in found:
        ids, mask = context["input_ids"], context["completion_mask"]
        assert mask == [0] * (len(ids) - 8) + [1] * 8
        start = len(tokenizer(tokenizer.decode(ids).split(": ")[0] + ": ")["input_ids"])
        assert (len(ids) - 8 - start) % 8 == 0
    assert len(contexts_of(model, words, 100)) <= 12


def test_log_prob_is_that_of_the_last_block(model, words):
    network = AutoModelForCausalLM.from_pretrained(model)
    context = contexts_of(model, words, 1)[0]
    ids = torch.tensor([context["input_ids"]])
    labels = ids.clone()
    labels[:, :-8] = -100
    assert log_prob(network, context) == pytest.approx(-8 * network(ids, labels=labels).loss.item(), rel=1e-4)


def test_rollouts_that_are_all_the_same_have_no_gradient(model, words):
    context = contexts_of(model, words, 1)[0]
    drawn = measure([*words, "--num_generations", "2"], context, 4)
    assert drawn["noise"] > 0 and drawn["without"] < 1
    greedy = measure([*words, "--num_generations", "2", "--top_k", "1"], context, 4)
    assert greedy == {"signal": 0.0, "noise": 0.0, "without": 1.0}


def test_bins_hold_as_many_contexts_in_order_of_probability():
    rows = [{"log_prob": -float(i), "signal": float(i), "noise": 2.0, "without": i / 10} for i in (4, 1, 0, 3, 2)]
    first, second = by_probability(rows, 2)
    assert (first["contexts"], second["contexts"]) == (2, 3)
    assert (first["log_prob"], first["signal"], first["ratio"]) == (-0.5, 0.5, 0.25)
    assert (second["log_prob"], second["without"], second["ratio"]) == (-3.0, pytest.approx(0.3), 1.5)


def test_the_command_writes_what_it_shows(words, tmp_path, capsys):
    main([*words, "--contexts", "3", "--updates", "4", "--bins", "3", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    shown = capsys.readouterr().out
    assert len(rows) == 3 and all(f"{row['log_prob']:.2f}" in shown for row in rows)
    with pytest.raises(SystemExit):
        main([*words, "--contexts", "3", "--bins", "4"])
