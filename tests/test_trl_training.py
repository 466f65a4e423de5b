"""GRPOTrainer and RLOOTrainer of TRL with the feature-matching reward: their step is the one that EBFT stands for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
import trl_processes
from ebft.integrations.tokens import Tokens
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model
from training import relative_error, small_model
from trl_setup import EOS, SETTINGS, slow_features, word_model, word_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "trl_reward.py"


def groups_of(seen: list) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, list]]:
    """For each prompt the features [n, D] of its completions and [D] of its reference, one run each, and the rows."""
    words, model, groups = word_tokenizer(), word_model(seed=1), {}
    references = {tuple(words(row["prompt"])["input_ids"]): row["reference"] for row in trl_processes.ROWS}
    for prompt, reference in references.items():
        rows = [row for row in seen if tuple(row[0]) == prompt]
        ids = [*words(reference)["input_ids"], EOS][: SETTINGS["max_completion_length"]]
        runs = [slow_features(model, list(prompt), ids).numpy() for ids in [*(row[1] for row in rows), ids]]
        groups[prompt] = (np.stack(runs[:-1]), runs[-1], rows)
    return groups


def policy_gradient_step(before: dict[str, Tensor], seen: list, denominator: float) -> dict[str, Tensor]:
    """The weights after a step of SGD on the mean of -A log p(completion) / denominator, a run for each completion."""
    model = word_model(dtype=torch.float32)
    model.load_state_dict(before)
    total = torch.zeros(())
    for prompt, completion, advantage in seen:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / SETTINGS["temperature"]
        log_probs = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
        total = total - advantage * log_probs.sum() / len(seen) / denominator
    total.backward()
    rate = trl_processes.STEP["learning_rate"]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["lm_head.weight"] = gradients["model.embed_tokens.weight"]  # tied
    return {name: value - rate * gradients[name] for name, value in before.items()}


def check_step(kind: str, seen: list, result: dict[str, Any]) -> None:
    """Advantages, metrics and new weights of a step, all from the features of single runs."""
    groups = groups_of(seen)
    for X, y, rows in groups.values():
        assert len(rows) == SETTINGS["num_generations"]
        expected = oracles.leave_one_out_advantage(X, y, 1.0, 1.0)
        assert [row[2] for row in rows] == pytest.approx(expected, abs=2e-6)
    assert max(abs(row[2]) for row in seen) > 0.1
    logs = result["logs"][0]
    loss = np.mean([oracles.u_statistic(X, y) for X, y, _ in groups.values()])
    assert logs["feature_matching_loss"] == pytest.approx(loss, abs=1e-5)
    assert logs["completions/truncated_rate"] == pytest.approx(logs["completions/clipped_ratio"]) != 0
    assert logs["references/truncated_rate"] == 0.25
    # dr_grpo divides by the longest length that a completion may have, as EBFT's loss does by its blocks'.
    denominator = SETTINGS["max_completion_length"] if kind == "grpo" else 1
    expected = policy_gradient_step(result["before"], seen, denominator)
    assert relative_error(result["before"], result["after"], expected) < 1e-4


@pytest.mark.parametrize("kind", trl_processes.CONFIGS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_step_is_that_of_leave_one_out(tmp_path, kind, micro_batches):
    """Also where TRL shuffles a generated batch and cuts it into micro-batches across groups."""
    sizes = dict(per_device_train_batch_size=12 // micro_batches, gradient_accumulation_steps=micro_batches)
    result = trl_processes.run(kind, tmp_path, **sizes)
    check_step(kind, result["seen"], result)


@pytest.mark.parametrize("kind", trl_processes.CONFIGS)
@pytest.mark.parametrize("conversational", [False, True])
def test_prompts_have_the_tokens_that_the_trainer_samples_behind(tmp_path, kind, conversational):
    """A reward function is not told them."""
    tokenizer = byte_bpe_tokenizer(chat_template=conversational)
    texts = ["the dog", "what is", "def add(a, b):\n", "a"]
    if conversational:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>' + name + '")
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    settings = {"chat_template_kwargs": {"name": "me"}} if conversational else {}
    rows = [{"prompt": prompt, "reference": "four"} for prompt in prompts]
    model = small_model(dtype=torch.float32)
    seen = trl_processes.run(kind, tmp_path, rows, model, tokenizer, **settings)["seen"]
    tokens = Tokens(tokenizer, settings.get("chat_template_kwargs", {}))
    assert {tuple(row[0]) for row in seen} == {tokens.prompt(prompt) for prompt in prompts}


@pytest.mark.parametrize("kind", trl_processes.CONFIGS)
def test_training_lowers_the_feature_matching_loss(tmp_path, kind):
    rows = [{"prompt": "a b", "reference": "c c"}] * 4
    rate = 0.05 if kind == "rloo" else 0.2
    logs = trl_processes.run(kind, tmp_path, rows=rows, max_steps=25, learning_rate=rate)["logs"]
    losses = [record["feature_matching_loss"] for record in logs if "feature_matching_loss" in record]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*launch, trl_processes.__file__, str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", trl_processes.CONFIGS)
def test_two_processes(together, kind):
    """Each has whole groups, and together they make the step over all of them."""
    ranks = [torch.load(together / f"{kind}_{rank}.pt", weights_only=False) for rank in (0, 1)]
    prompts = [{tuple(row[0]) for row in rank["seen"]} for rank in ranks]
    assert [len(of_rank) for of_rank in prompts] == [2, 2] and not prompts[0] & prompts[1]
    check_step(kind, ranks[0]["seen"] + ranks[1]["seen"], ranks[0])


def test_groups_split_between_two_processes_are_refused(together):
    for rank in (0, 1):
        message = json.loads((together / f"error_{rank}.json").read_text())
        assert message.startswith("per_device_train_batch_size x steps_per_generation is 2, no multiple of")


def test_example(tmp_path):
    """As a user runs it, on a model and a file of this machine."""
    tokenizer = byte_bpe_tokenizer()
    tiny_model(vocab_size=len(tokenizer), dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the dog {i}", "completion": " sleeps"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(EXAMPLE), "model", "rows.jsonl", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("'feature_matching_loss'") == 2
    assert (tmp_path / "runs" / "trl_reward" / "model.safetensors").exists()
