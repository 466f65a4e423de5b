"""Holds examples/ebft_in_one_file.py against brute force: one causal forward per prefix, rollout and token."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

import oracles

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "ebft_in_one_file.py"
FIXTURES = pathlib.Path(__file__).parent / "fixtures"
META = json.loads((FIXTURES / "meta.json").read_text(encoding="utf-8"))
VOCABULARY = 13
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.3, "attn_implementation": "sdpa"}  # .3: far from uniform


@pytest.fixture(scope="module")
def one():
    spec = importlib.util.spec_from_file_location("ebft_in_one_file", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def tiny_model(seed=0, family="qwen2"):
    torch.manual_seed(seed)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).double().eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)).double().eval()


@pytest.fixture(scope="module", params=["qwen2", "gpt_neox"])
def model(request):
    return tiny_model(family=request.param)


@pytest.fixture
def document():
    return torch.randint(VOCABULARY, (23,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def config(one):
    return one.Config(context_length=3, stride=4, completion_length=3, num_generations=4, temperature=0.7, ce_coef=0.3)


def assert_gradients_close(model, fast, slow):
    """Within rounding of the largest gradient. Qwen2's norms compute in float32 whatever the weights are."""
    parameters = list(model.parameters())
    fast, slow = (torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters)]) for x in (fast, slow))
    tolerance = 1e-11 if model.config.model_type == "gpt_neox" else 1e-6
    assert slow.abs().max() > 1e-3
    torch.testing.assert_close(fast, slow, rtol=0, atol=tolerance * slow.abs().max().item())


def uniforms_for(one, documents, config, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [one.draw_uniforms(document, config, generator) for document in documents]


# ---- the slow, obvious versions ----


def each_rollout(document, anchors, tokens):
    """(k, j, prefix + rollout) for every block and rollout."""
    for k, anchor in enumerate(anchors.tolist()):
        for j in range(tokens.shape[1]):
            yield k, j, torch.cat([document[:anchor], tokens[k, j]])


def slow_log_probs(model, sequence, start, temperature):
    """Log-probs of sequence[start:] from one plain causal forward: no mask and no position ids of ours."""
    logits = model(sequence[None]).logits[0] / temperature
    return logits[start - 1 : -1].log_softmax(-1).gather(-1, sequence[start:, None])[:, 0]


def slow_feature(model, sequence):
    """The last token's hidden states after layers 1, 2 and 3 of 5 (floor of 1.25, 2.5, 3.75), one L2 norm."""
    hidden = model(sequence[None], output_hidden_states=True).hidden_states
    phi = torch.cat([hidden[i][0, -1] for i in (1, 2, 3)])
    return phi / phi.norm()


def slow_rewards(phi, phi_y, whitening):
    """Alignment and diversity of one context, in feature space."""
    return [torch.from_numpy(term) for term in oracles.rewards(phi.numpy(), phi_y.numpy(), whitening)]


# ---- the file itself ----


def test_file_is_short_and_stands_alone():
    text = EXAMPLE.read_text(encoding="ascii")
    assert len(text.splitlines()) <= 300
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_main_prints_a_table(one, capsys):
    one.main(pretraining_steps=2, steps=1, report_every=1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(math.isfinite(float(cell)) for row in rows for cell in row)
    assert rows[0][1:] != rows[1][1:]


# ---- blocks ----


@pytest.mark.parametrize(
    ("P", "c", "s", "G"), [(23, 3, 4, 3), (16, 8, 8, 8), (15, 8, 8, 8), (17, 1, 1, 5), (2, 4, 2, 4)]
)
def test_anchors(one, P, c, s, G):
    expected = [a for a in range(c, P, s) if a + G <= P]
    assert one.block_anchors(P, c, s, G).tolist() == expected
    assert len(expected) == max(0, (P - G - c) // s + 1)


def test_mask_and_positions_token_by_token(one):
    P, n, G = 11, 2, 3
    anchors = torch.tensor([2, 4, 8])
    # (position, rollout) of every packed token; the document has rollout None
    packed = [(i, None, None) for i in range(P)]
    packed += [(a + t, (k, j), a) for k, a in enumerate(anchors.tolist()) for j in range(n) for t in range(G)]
    mask = one.block_mask(P, anchors, n, G)
    assert mask.dtype == torch.bool
    for q, (q_position, q_rollout, q_anchor) in enumerate(packed):
        for k, (k_position, k_rollout, _) in enumerate(packed):
            if q_rollout is not None and k_rollout is None:
                assert q_anchor is not None
                expected = k_position < q_anchor
            else:
                expected = q_rollout == k_rollout and k_position <= q_position
            assert mask[q, k] == expected, (q, k)
    assert one.block_positions(P, anchors, n, G).tolist() == [position for position, _, _ in packed]


@pytest.mark.parametrize("name", ["layout_plain", "layout_overlap"])
def test_mask_and_positions_of_the_authors(one, name):
    case, sizes = np.load(FIXTURES / f"{name}.npz"), META[name]
    P, G = sizes["P"], sizes["completion_length"]
    anchors = one.block_anchors(P, sizes["context_length"], sizes["stride"], G)
    assert len(anchors) == sizes["num_blocks"]
    assert torch.equal(one.block_mask(P, anchors, 1, G), torch.from_numpy(case["mask"]))
    assert one.block_positions(P, anchors, 1, G).tolist() == case["position_ids"].tolist()


# ---- policy ----


@pytest.mark.parametrize("temperature", [0.7, 1.3, 1e-6])
def test_samples_are_those_of_each_prefix_alone(one, model, document, config, temperature):
    anchors = one.block_anchors(len(document), 3, 4, 3)
    (noise,) = uniforms_for(one, [document], config)
    tokens = one.sample(model, document, anchors, noise, temperature)
    for k, j, sequence in each_rollout(document, anchors, tokens):
        for t in range(3):
            logits = model(sequence[None, : anchors[k] + t]).logits[0, -1]
            cumulative = (logits / temperature).softmax(-1).cumsum(-1).tolist()
            drawn = next((v for v, total in enumerate(cumulative) if total > noise[k, j, t]), VOCABULARY - 1)
            assert tokens[k, j, t] == drawn
            if temperature < 1e-3:
                assert drawn == logits.argmax()
    assert len(tokens.unique()) > 2  # else nothing was tested


def test_samples_follow_the_distribution(one, model, document):
    n = 500  # evenly spaced uniforms: frequencies may be off by 1/n, and not by chance
    noise = ((torch.arange(n) + 0.5) / n).double()[None, :, None]
    counts = one.sample(model, document, torch.tensor([6]), noise, 0.7).flatten().bincount(minlength=VOCABULARY)
    expected = (model(document[None, :6]).logits[0, -1] / 0.7).softmax(-1)
    assert (counts / n - expected).abs().max() <= 1 / n


def test_the_last_token_catches_what_rounding_leaves_over(one, model, document):
    tokens = one.sample(model, document, torch.tensor([6]), torch.ones(1, 1, 1), 0.7)
    assert tokens.item() == VOCABULARY - 1


def test_log_probs_values_and_gradients(one, model, document, config):
    anchors = one.block_anchors(len(document), 3, 4, 3)
    (noise,) = uniforms_for(one, [document], config)
    tokens = one.sample(model, document, anchors, noise, 0.7)
    of_document, of_blocks = one.log_probs(model, document, tokens, anchors, 0.7)
    slow_document = slow_log_probs(model, document, 1, 1.0)
    slow_blocks = torch.zeros_like(of_blocks)
    for k, j, sequence in each_rollout(document, anchors, tokens):
        slow_blocks[k, j] = slow_log_probs(model, sequence, int(anchors[k]), 0.7)
    torch.testing.assert_close(of_document, slow_document, rtol=0, atol=1e-10)
    torch.testing.assert_close(of_blocks, slow_blocks, rtol=0, atol=1e-10)

    weights = torch.randn(of_blocks.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = (weights * of_blocks).sum() + of_document.sum()
    assert_gradients_close(model, fast, (weights * slow_blocks).sum() + slow_document.sum())


# ---- features, rewards, advantages ----


def test_features_are_those_of_each_sequence_alone(one, model, document):
    anchors = torch.tensor([3, 7, 20])
    tokens = torch.randint(VOCABULARY, (3, 4, 3), generator=torch.Generator().manual_seed(2))
    tokens[1, 3] = tokens[1, 0]
    generated, reference = one.features(model, document, tokens, anchors)
    assert generated.shape == (3, 4, 48)
    for k, j, sequence in each_rollout(document, anchors, tokens):
        torch.testing.assert_close(generated[k, j], slow_feature(model, sequence), rtol=0, atol=1e-10)
    for k, anchor in enumerate(anchors.tolist()):
        torch.testing.assert_close(reference[k], slow_feature(model, document[: anchor + 3]), rtol=0, atol=1e-10)
    assert not generated.requires_grad


def test_equal_rollouts_share_their_features(one, document):
    model = tiny_model().float()
    tokens = torch.randint(VOCABULARY, (2, 7, 3), generator=torch.Generator().manual_seed(2))
    tokens[:, [2, 5, 6]] = tokens[:, [1, 1, 0]]
    tokens[1, 0] = tokens[0, 1]  # another block's rollout is another context: no sharing
    generated, _ = one.features(model, document, tokens, torch.tensor([3, 7]))
    assert torch.equal(generated[:, [2, 5]], generated[:, [1, 1]])
    assert torch.equal(generated[0, 6], generated[0, 0])
    assert not torch.equal(generated[1, 0], generated[0, 1])


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("duplicates", [False, True])
def test_rewards_and_advantages(one, n, duplicates):
    generator = torch.Generator().manual_seed(n)
    phi = torch.randn(5, n, 16, dtype=torch.float64, generator=generator)
    phi_y = torch.randn(5, 16, dtype=torch.float64, generator=generator)
    if duplicates:
        phi[:, -1] = phi[:, 0]
    plain, whitened = one.rewards(phi, phi_y, "none"), one.rewards(phi, phi_y, "paper")
    weighted = one.rewards(phi, phi_y, "paper", alignment_coef=0.5, diversity_coef=0.25)
    for k in range(5):
        for terms, whitening in ((plain, "none"), (whitened, "paper")):
            for term, expected in zip(terms, slow_rewards(phi[k], phi_y[k], whitening), strict=True):
                torch.testing.assert_close(term[k], expected, rtol=1e-8, atol=1e-8)
        advantage = oracles.leave_one_out_advantage(phi[k].numpy(), phi_y[k].numpy(), 1.0, 1.0)
        torch.testing.assert_close(one.advantages(*plain)[k], torch.from_numpy(advantage))
    torch.testing.assert_close(weighted, (0.5 * whitened[0], 0.25 * whitened[1]))
    # whitening leaves a diversity term to duplicates alone: n/2 each of the n Q_jj' of their pair
    expected = torch.zeros(5, n, dtype=torch.float64)
    if duplicates:
        expected[:, [0, -1]] = n / (n - 1)
    torch.testing.assert_close(whitened[1], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in META if name.startswith("rewards")])
@pytest.mark.parametrize(("whitening", "tolerance"), [("none", 2e-5), ("paper", 1e-7)])
def test_rewards_of_the_authors(one, name, whitening, tolerance):
    case = {key: torch.from_numpy(value).double() for key, value in np.load(FIXTURES / f"{name}.npz").items()}
    weights = {key: META[name][key] for key in ("alignment_coef", "diversity_coef")}
    alignment, diversity = one.rewards(case["features"], case["reference"], whitening, **weights)
    advantage = one.advantages(alignment, diversity)
    fast = {"alignment": alignment / weights["alignment_coef"], "diversity": diversity / weights["diversity_coef"]}
    for key, value in {**fast, "reward": alignment - diversity, "advantage": advantage}.items():
        torch.testing.assert_close(value, case[f"{whitening}_{key}"], rtol=tolerance, atol=tolerance)
    loss = one.feature_matching_loss(case["features"], case["reference"])
    torch.testing.assert_close(loss, case["fm_unbiased"], rtol=2e-5, atol=2e-5)


def test_a_reference_without_any_likeness_is_aligned_with_nobody(one):
    phi = torch.eye(3, 5, dtype=torch.float64)[None]
    alignment, _ = one.rewards(phi, torch.eye(5, dtype=torch.float64)[None, 4], "paper")
    assert torch.equal(alignment, torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 3])
def test_estimates_are_exact_on_average(one, n):
    """All n-tuples of all completions of a toy sampler, weighted: the loss's and the gradient's expectations."""
    completions, D = 6, 4
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(completions, D, dtype=torch.float64, generator=generator)
    phi_y = torch.randn(D, dtype=torch.float64, generator=generator)
    logits = torch.randn(completions, dtype=torch.float64, generator=generator).requires_grad_()
    log_p = logits.log_softmax(-1)
    loss = (log_p.exp() @ phi - phi_y).square().sum()  # L_CFM
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)

    groups = torch.tensor(list(itertools.product(range(completions), repeat=n)))  # [completions^n, n]
    probability = log_p.detach()[groups].sum(-1).exp()
    references = phi_y.expand(len(groups), D)
    estimate = one.feature_matching_loss(phi[groups], references)
    torch.testing.assert_close((probability * estimate).sum(), loss.detach())
    advantage = one.advantages(*one.rewards(phi[groups], references, "none"))
    surrogate = (probability * (-advantage * log_p[groups]).mean(-1)).sum()
    (estimated,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(estimated, gradient)


# ---- the loss ----


def slow_loss(one, policy, feature_model, documents, uniforms, config):
    """The loss from plain forwards; only the tokens come from `sample`, which has a test of its own."""
    policy_terms, ce_terms = [], []
    for document, noise in zip(documents, uniforms, strict=True):
        ce_terms += list(-slow_log_probs(policy, document, 1, 1.0))
        for k, anchor in enumerate(range(3, len(document) - 3 + 1, 4)):
            prefix = document[:anchor]
            tokens = one.sample(policy, document, torch.tensor([anchor]), noise[k : k + 1], config.temperature)[0]
            sequences = [torch.cat([prefix, rollout]) for rollout in tokens]
            with torch.no_grad():
                table = {tuple(s.tolist()): slow_feature(feature_model, s) for s in sequences}
                phi = torch.stack([table[tuple(s.tolist())] for s in sequences])
                phi_y = slow_feature(feature_model, document[: anchor + 3])
            a, d = slow_rewards(phi, phi_y, config.whitening)
            a, d = config.alignment_coef * a, config.diversity_coef * d
            baseline = (a.sum() - a) / 3 - (d.sum() - 2 * d) / 2  # n = 4
            for advantage, s in zip(a - d - baseline, sequences, strict=True):
                policy_terms += list(-advantage * slow_log_probs(policy, s, anchor, config.temperature))
    return config.rl_coef * torch.stack(policy_terms).mean() + config.ce_coef * torch.stack(ce_terms).mean()


@pytest.mark.parametrize("whitening", ["none", "paper"])
def test_loss_and_gradients(one, model, document, config, whitening):
    config = dataclasses.replace(config, whitening=whitening, alignment_coef=0.9, diversity_coef=0.6, rl_coef=0.8)
    feature_model = tiny_model(seed=7).requires_grad_(False)
    documents = [document, document[5:], document[:4], document[9:16]]  # the third one is too short for a block
    noise = uniforms_for(one, documents, config)
    assert [len(u) for u in noise] == [5, 4, 0, 1]
    fast, metrics = one.ebft_loss(model, feature_model, documents, noise, config)
    slow = slow_loss(one, model, feature_model, documents, noise, config)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
    assert_gradients_close(model, fast, slow)
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_the_policy_term_it_is_cross_entropy(one, model, document, config):
    config = dataclasses.replace(config, rl_coef=0.0, ce_coef=1.0)
    loss, metrics = one.ebft_loss(model, None, [document], uniforms_for(one, [document], config), config)
    expected = model(document[None], labels=document[None]).loss.double()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert metrics["ce"] == pytest.approx(loss.item())


def test_optimizer_steps(one, document, config):
    """AdamW by hand: 40 steps warm up over 2, and every gradient is clipped and then forgotten."""
    config = dataclasses.replace(config, rl_coef=0.0, ce_coef=5.0, learning_rate=1e-2)
    policy = tiny_model()
    one.train(policy, None, [document], config, steps=40)
    expected = tiny_model()
    parameters = list(expected.parameters())
    first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for step in range(1, 41):
        loss = 5.0 * -slow_log_probs(expected, document, 1, 1.0).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        rate = 1e-2 * min(1.0, step / 2)
        with torch.no_grad():
            for parameter, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
                gradient = gradient * min(1.0, 1.0 / norm)
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.95).add_(gradient.square(), alpha=0.05)
                parameter -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    for parameter, slow in zip(policy.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=0, atol=1e-4)  # one step moves a weight by about 1e-2


def test_training_lowers_the_loss_and_leaves_the_feature_model_alone(one, config):
    """One context, a fixed reference, no whitening: some steps of training must lower the feature-matching loss."""
    policy, feature_model = tiny_model(seed=1), tiny_model(seed=1).requires_grad_(False)
    before = [parameter.clone() for parameter in feature_model.parameters()]
    document = torch.randint(VOCABULARY, (6,), generator=torch.Generator().manual_seed(3))
    config = dataclasses.replace(
        config, num_generations=32, whitening="none", ce_coef=0.0, learning_rate=3e-3, documents_per_step=1
    )
    noise = uniforms_for(one, [document], config)
    with torch.no_grad():
        _, start = one.ebft_loss(policy, feature_model, [document], noise, config)
    one.train(policy, feature_model, [document], config, steps=20)
    with torch.no_grad():
        _, end = one.ebft_loss(policy, feature_model, [document], noise, config)
    assert end["fm_loss"] < start["fm_loss"] - 0.1
    for parameter, old in zip(feature_model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
