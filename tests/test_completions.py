"""Rollouts of whole completions: where they end, what they are compared with, the step, and models of any kind."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub

import oracles
import step_oracle
from ebft import BlockLayout, FeatureNetwork, block_log_probs
from ebft.cli.arguments import parse
from ebft.cli.plan import make_plan
from ebft.cli.train import run as run_train
from ebft.forward import packs
from ebft.models import complete_stop_token_ids
from ebft.rollout import sample_rollouts
from enumeration import VOCAB, G, mean_estimate
from test_trainer_step import LORA, check_step, oracle_documents
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model
from training import config, documents, read_metrics, read_rollouts, relative_error, small_model, train, trainer

TOKENIZER = byte_bpe_tokenizer()
END_OF_TEXT: Any = TOKENIZER.eos_token_id
STOPS = [END_OF_TEXT, *range(40, 90)]  # many, so that rollouts of random weights end
LENGTHS, PROMPTS = [23, 9, 17, 30, 12, 26], [9, 2, 3, 11, 5, 24]
SETTINGS = dict(rollout="completion", max_completion_length=11, stop_token_ids=STOPS, temperature=1.0)
PLAIN = ("bloom", "bamba", "qwen3_next")  # families whose rows cannot branch


def rows(ends=True) -> list[dict]:
    """Documents whose completions end in a stop token, where wanted, and have none before it."""
    found = documents(LENGTHS, prompts=PROMPTS, vocabulary=40)
    for row in found if ends else []:
        row["input_ids"][-1] = END_OF_TEXT
    return found


# --- where completions lie ---


def layout_of(texts: list[str], longest=4) -> BlockLayout:
    """One document per text: lower case is prompt, upper case completion, E an end, | begins another document."""
    width = max(map(len, texts))
    doc_ids = torch.full((len(texts), width), -1)
    starts, ends = torch.zeros(2, len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        doc = 0
        for place, letter in enumerate(text):
            doc += letter == "|"
            doc_ids[row, place] = doc
            before = text[place - 1] if place else "|"
            starts[row, place] = letter.isupper() and not before.isupper()
            ends[row, place] = letter == "E"
    return BlockLayout.from_completions(doc_ids, starts, ends, longest)


def test_completions_of_documents():
    layout = layout_of(["abcABE", "aAAAAAAE", "abAE|abcdAEcdBBE", "aABC", "Eab", "aE"])
    columns: Any = (layout.anchors, layout.prefix_starts, layout.reference_lengths)
    table = torch.stack(columns, dim=-1)
    found = [[tuple(x) for x in row[valid].tolist()] for row, valid in zip(table, layout.valid, strict=True)]
    assert found[0] == [(3, 0, 3)]
    assert found[1] == [(1, 0, 4)]  # longer than the longest rollout: cut as a rollout is
    assert found[2] == [(2, 0, 2), (9, 4, 2), (13, 4, 3)]  # two turns of one document, each with its whole history
    assert found[3] == []  # cut: there is no end to compare with
    assert found[4] == []  # no prefix
    assert found[5] == [(1, 0, 1)]


def test_references_end():
    layout = layout_of(["abcABE", "aAE"])
    ids = torch.arange(12).view(2, 6)
    assert layout.references(ids).tolist() == [[[3, 4, 5]], [[7, 8, -100]]]
    chosen: Any = layout.select(torch.tensor([[True], [False]]))
    assert chosen.reference_lengths.tolist() == [[3], [1]]
    assert chosen.references(ids).tolist() == [[[3, 4, 5]], [[-100] * 3]]


# --- sampling ---


def slow_rollout(model, prefix, uniforms, stops) -> list[int]:
    """Token by token, each from a run of its own; the inverse of the cumulative distribution at the given noise."""
    tokens: list[int] = []
    for u in uniforms.tolist():
        logits = model(torch.cat([prefix, torch.tensor(tokens, dtype=torch.long)])[None]).logits[0, -1]
        tokens.append(int((logits.double().softmax(-1).cumsum(-1) > u).int().argmax()))
        if tokens[-1] in stops:
            break
    return tokens


@pytest.mark.parametrize("family", ["qwen2", *PLAIN])
@torch.no_grad()
def test_rollouts_end(family):
    """Prefixes of several lengths, two of one row; tokens, lengths, log-probs and what is behind the end."""
    # With padding on the left transformers' Bloom is not a number in double precision.
    model = tiny_model(family, scale=3.0, dtype=torch.float64 if family == "qwen2" else torch.float32)
    stops = list(range(30, 40))
    ids = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(1))
    starts, ends = torch.zeros(2, 2, 14, dtype=torch.bool)
    starts[0, [3, 9]], ends[0, [6, 12]], starts[1, 5], ends[1, 7] = True, True, True, True
    layout = BlockLayout.from_completions(torch.zeros(2, 14, dtype=torch.long), starts, ends, 21)
    uniforms = torch.rand(2, 2, 3, 21, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found: Any = sample_rollouts(model, ids, layout, 3, uniforms=uniforms, stop_token_ids=stops)
    seen = set()
    for b, k in layout.valid.nonzero().tolist():
        prefix = ids[b, : layout.anchors[b, k]]
        for n in range(3):
            expected = slow_rollout(model, prefix, uniforms[b, k, n], stops)
            length, clipped = int(found.lengths[b, k, n]), bool(found.clipped[b, k, n])
            assert found.tokens[b, k, n, :length].tolist() == expected
            assert clipped == (expected[-1] not in stops) and (not clipped or length == 21)
            logits = model(torch.cat([prefix, torch.tensor(expected)])[None]).logits[0, len(prefix) - 1 : -1]
            log_probs = logits.double().log_softmax(-1).gather(-1, torch.tensor(expected)[:, None])[:, 0]
            torch.testing.assert_close(found.log_probs[b, k, n, :length].double(), log_probs, rtol=0, atol=2e-5)
            for behind in found[:3]:
                assert not behind[b, k, n, length:].any()
            seen.add(length)
    assert len(seen) > 2 and found.tokens.shape[-1] == max(seen)
    assert not found.lengths[1, 1].any() and not found.tokens[1, 1].any()  # there is no second block in that row


# --- the gradient ---

MOST, END = 3, 3  # tokens of a completion over {0, 1, 2, END}


def all_completions() -> list[tuple[int, ...]]:
    """Every completion of at most MOST tokens that ends with END or is cut: their probabilities sum to 1."""
    found, open_ends = [], [()]
    for _ in range(MOST):
        grown = [(*c, token) for c in open_ends for token in range(VOCAB)]
        found += [c for c in grown if c[-1] == END]
        open_ends = [c for c in grown if c[-1] != END]
    return found + open_ends


@pytest.mark.parametrize("pooling", ["last_token", "mean_pooling"])
@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
@pytest.mark.parametrize("n", [2, 3])
def test_mean_gradient_is_exact(family, pooling, n):
    """With an EOS in the vocabulary: the mean of a step's gradient is that of the enumerated loss, over MOST."""
    sizes: dict[str, Any] = (
        {"vocab_size": VOCAB, "pad_token_id": None} if family == "gpt_neox" else {"vocab_size": VOCAB}
    )
    policy, frozen = (tiny_model(family, seed=seed, scale=3.0, dtype=torch.float64, **sizes) for seed in (0, 1))
    params, document = list(policy.parameters()), torch.tensor([[0, 2, 1, 2, 1, END]])
    starts, ends = torch.zeros(2, 1, 6, dtype=torch.bool)
    starts[0, 3], ends[0, 5] = True, True
    layout = BlockLayout.from_completions(torch.zeros(1, 6, dtype=torch.long), starts, ends, MOST)

    completions = all_completions()
    lengths = torch.tensor([len(c) for c in completions])
    tokens = torch.tensor([[*c, *[0] * (MOST - len(c))] for c in completions])[None, None]
    mask = torch.arange(MOST) < lengths[:, None]
    log_probs = block_log_probs(policy, document, tokens, layout)[0, 0].where(mask, 0.0)
    phi = FeatureNetwork(frozen, pooling=pooling)
    gen, ref = phi(document, tokens, layout, lengths[None, None])
    mean = mean_estimate(log_probs, gen[0, 0], ref[0, 0], params, n, "leave_one_out")

    # The exact side: one run per completion.
    def features(ids, begin):
        hidden = torch.cat(frozen(ids, output_hidden_states=True).hidden_states[1:4], -1)[0, begin:].detach()
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        return hidden[-1] if pooling == "last_token" else hidden.mean(0)

    exact_log_probs = torch.zeros(len(completions), dtype=torch.float64)
    exact_phi = []
    for i, completion in enumerate(completions):
        ids = torch.cat([document[:, :3], torch.tensor(completion)[None]], 1)
        picked = policy(ids).logits[0, 2:-1].log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
        exact_log_probs = exact_log_probs.index_put((torch.tensor(i),), picked.sum())
        exact_phi.append(features(ids, 3))
    probs = exact_log_probs.exp()
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-9)
    loss = oracles.quadratic_loss(probs, torch.stack(exact_phi), features(document, 3))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) / MOST
    assert exact.norm() > 1e-3
    torch.testing.assert_close(mean * G / MOST, exact, rtol=0, atol=1e-9)  # the constant, not what was sampled


# --- a step of the trainer ---

CASES = {
    "last_token": {},
    "mean": dict(pooling="mean_pooling"),
    "batches": dict(per_device_train_batch_size=2, gradient_accumulation_steps=3),
    "together": dict(per_device_train_batch_size=1, gradient_accumulation_steps=6, per_device_generation_batch_size=4),
    "packed": dict(packing=True),
    "kl_in_reward": dict(beta=0.2),
    "kl_in_loss": dict(beta=0.2, kl_estimator="k2"),
    "checkpointing": dict(gradient_checkpointing=True),
    "rloo": dict(whitening="none", advantage_estimator="rloo"),
}


def run_case(folder, family="qwen2", adapted=False, **settings):
    from peft import get_peft_model

    model = small_model(family, dtype=torch.float64, scale=4.0)
    torch.manual_seed(5)
    model = get_peft_model(model, LORA) if adapted else model
    plain = copy.deepcopy(model)
    return train(model, rows(), folder, settings=SETTINGS | settings), plain


@pytest.mark.parametrize("case", [case for case in CASES if case != "rloo"])
def test_step_is_the_oracles(tmp_path, case):
    run, plain = run_case(tmp_path, **CASES[case])
    groups = read_rollouts(tmp_path)
    assert {document for document, _ in groups} == {0, 1, 2, 3, 4, 5}
    lengths = [len(row["token_ids"]) for group in groups.values() for row in group]
    assert len(set(lengths)) > 3 and max(lengths) <= 11
    assert run.metrics[0]["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    cut = [row["token_ids"][-1] not in STOPS for group in groups.values() for row in group]
    assert run.metrics[0]["completions/clipped_ratio"] == pytest.approx(sum(cut) / len(cut))
    check_step(run, plain, oracle_documents(rows()))


@pytest.mark.parametrize("family", PLAIN)
def test_step_of_any_causal_model(tmp_path, family):
    """Rows that share nothing: the same step, in single precision where the family knows no other."""
    model = small_model(family, scale=4.0)
    assert not packs(model)
    plain = copy.deepcopy(model)
    run = train(model, rows(), tmp_path, settings=SETTINGS)
    check_step(run, plain, oracle_documents(rows()), tolerance=2e-3)


def test_batches_do_not_matter(tmp_path):
    one, _ = run_case(tmp_path / "one")
    for name in ("batches", "together", "packed"):
        other, _ = run_case(tmp_path / name, **CASES[name])
        assert relative_error(one.weights[0], other.weights[1], one.weights[1]) < 1e-5, name


def test_lora_and_resume(tmp_path):
    """An adapter, and a resumed run that ends in the same bits."""
    settings: dict[str, Any] = dict(
        max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2
    )
    whole, _ = run_case(tmp_path / "whole", adapted=True, **settings)
    model = copy.deepcopy(run_case(tmp_path / "unused", adapted=True, max_steps=1)[1])
    rest = train(
        model,
        rows(),
        tmp_path / "rest",
        settings=SETTINGS | settings,
        resume=str(tmp_path / "whole" / "checkpoint-2"),
    )
    for name, value in whole.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], value), name


# --- what is refused, and the command line ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pooling="concat"), "pooling='concat' needs rollouts of one length"),
        (dict(anchors="all"), "anchors='all' with rollout='completion'"),
        (dict(random_anchor_offset=True), "random_anchor_offset=True is for rollout: blocks"),
        (dict(reuse_sampling_forward=True), "reuse_sampling_forward=True is for rollout: blocks"),
        (dict(max_completion_length=0), "max_completion_length=0 must be at least 1"),
        (dict(stop_token_ids=[]), r"stop_token_ids=\[\]: give a list of token ids"),
        (dict(stop_token_ids=5), "stop_token_ids=5: give a list of token ids"),
        (dict(stop_token_ids=["a"]), r"stop_token_ids=\['a'\]: give a list of token ids"),
        (dict(completion_length=16), "completion_length=16 does nothing without rollout: blocks"),
        (dict(stride=2), "stride=2 does nothing without rollout: blocks"),
        (dict(context_length=1), "context_length=1 does nothing without rollout: blocks"),
        (dict(rollout="blockz"), "rollout='blockz' is unknown: use one of blocks, completion"),
    ],
)
def test_settings_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **(SETTINGS | settings))


def test_data_refused(tmp_path):
    with pytest.raises(ValueError, match="rollout='completion' needs prompts"):
        trainer(small_model(), documents([20, 30]), tmp_path, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"none of the 6 documents .* ends in one of \['<\|endoftext\|>'\]"):
        trainer(small_model(), rows(ends=False), tmp_path, settings=SETTINGS | dict(stop_token_ids=[END_OF_TEXT]))
    with pytest.raises(ValueError, match=r"to what ends the completions \(most often '<\|endoftext\|>', 1\)"):
        trainer(small_model(), rows(), tmp_path, settings=SETTINGS | dict(stop_token_ids=[50]))
    half = [row | {"input_ids": [*row["input_ids"][:-1], 9]} for row in rows()[:3]] + rows()[3:]
    with pytest.warns(UserWarning, match=r"train_dataset: 3 of 6 of the first completions do not end in a stop token"):
        trainer(small_model(), half, tmp_path, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"stop_token_ids=\[1, 99999\]: the tokenizer has no 99999"):
        trainer(small_model(), rows(), tmp_path, settings=SETTINGS | dict(stop_token_ids=[1, 99999]))


def test_models_refused(tmp_path):
    with pytest.raises(ValueError, match="max_length=250 and max_completion_length=11 behind it exceed the model's"):
        trainer(small_model(), rows(), tmp_path, settings=SETTINGS | dict(max_length=250))
    with pytest.raises(ValueError, match="256 positions: lower max_completion_length, to less than 256"):
        trainer(small_model(), rows(), tmp_path, settings=SETTINGS | dict(max_completion_length=300))
    with pytest.raises(ValueError, match="model type 'mamba' is not supported: .* rollout: completion"):
        trainer(small_model("mamba"), rows(), tmp_path)
    with pytest.raises(ValueError, match="packing=True: model type 'mamba' cannot keep the documents"):
        trainer(small_model("mamba"), rows(), tmp_path, settings=SETTINGS | dict(packing=True))


def test_stop_tokens_are_the_models_and_the_tokenizers(tmp_path):
    model = small_model()
    model.generation_config.eos_token_id = [7, 9]
    ours = trainer(model, rows(), tmp_path, settings={k: v for k, v in SETTINGS.items() if k != "stop_token_ids"})
    assert ours.args.stop_token_ids == sorted([END_OF_TEXT, 7, 9])


@pytest.mark.parametrize(("revision", "end"), [({}, 7), ({"revision": "v1"}, 9)])
def test_stop_tokens_are_those_of_the_revision(tmp_path, monkeypatch, revision, end):
    for name, token in (("main", 7), ("v1", 9)):
        folder = tmp_path / "models--ours--tiny" / "snapshots" / name
        folder.mkdir(parents=True)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
        (tmp_path / "models--ours--tiny" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--ours--tiny" / "refs" / name).write_text(name)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    args: Any = SimpleNamespace(rollout="completion", stop_token_ids=None, model_init_kwargs=revision)
    complete_stop_token_ids(args, "ours/tiny", TOKENIZER)
    assert args.stop_token_ids == sorted([END_OF_TEXT, end])


def test_command_line(tmp_path):
    """Prompt and completion as text, an evaluation, the plan, and a length without what it is for."""
    small_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = tmp_path / "qa.jsonl"
    lines = [{"prompt": f"what is {i}? ", "completion": f"it is {i}."} for i in range(9)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data), "--max_length", "64"]
    words += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "--max_steps", "2", "--eval_split_size", "3"]
    words += ["--max_completion_length", "12", "--save_strategy", "no"]
    with pytest.raises(ValueError, match="max_completion_length: got 12, which does nothing without"):
        run_train(words)
    words += ["--rollout", "completion"]
    run_train(words)
    metrics = read_metrics(tmp_path / "run")
    assert all("completions/mean_length" in step for step in metrics if "loss" in step)
    evaluation = next(step for step in metrics if "eval_loss" in step)
    assert 1 <= evaluation["eval_completions/mean_length"] <= 12
    plan = make_plan(parse([*words, "--output_dir", str(tmp_path / "other")], "plan"))
    assert plan["settings"]["rollout"] == "completion" and plan["update"]["generated tokens"] > 0


@pytest.mark.parametrize("kernel", ["rbf", "energy", "characteristic"])
def test_step_with_a_kernel(tmp_path, kernel):
    """Completions of several lengths, under every kernel."""
    run, plain = run_case(tmp_path, kernel=kernel)
    args = run.trainer.args
    groups = read_rollouts(tmp_path)
    value = step_oracle.kernel_of(run.trainer.kernel_record)
    expected = step_oracle.step_loss(plain, plain, plain, oracle_documents(rows()), groups, args, value)
    after = step_oracle.sgd_step(plain, expected["loss"], args.learning_rate, args.max_grad_norm)
    assert relative_error(run.weights[0], run.weights[1], after) < 1e-5
    assert run.metrics[0]["feature_matching_loss"] == pytest.approx(float(expected["feature_matching_loss"]), rel=1e-6)
