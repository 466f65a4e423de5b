"""Evaluation on held-out documents against one context, one rollout and one length at a time."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset

import oracles
from ebft import BlockLayout, FeatureNetwork
from ebft.data import tokenize_documents
from ebft.evaluation import DocumentMean, FeatureCurve, cross_entropy, feature_matching_curve
from ebft.evaluation.batches import batches_of
from ebft.evaluation.feature_curve import contexts, curve_values
from ebft.noise import EVALUATION, sampling_uniforms
from enumeration import COMPLETIONS, VOCAB
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

LENGTHS = (1, 2, 4)
SETTINGS = dict(num_generations=3, contexts_per_document=2, context_length=3)


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=0, scale=3.0), tiny_model(seed=1, scale=3.0)


@pytest.fixture(scope="module")
def documents():
    """Raw text of unequal lengths; the last is too short for a context."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 61, (n,), generator=generator).tolist()} for n in (17, 30, 9, 5)]
    return tokenize_documents(Dataset.from_list(rows), byte_bpe_tokenizer(), max_length=64)


def prompts_and_completions():
    rows = [
        {"prompt": "the quick brown", "completion": " fox jumps"},
        {"prompt": "the dog", "completion": " sleeps; the"},
    ]
    tokenizer = byte_bpe_tokenizer()
    return tokenizer, tokenize_documents(Dataset.from_list(rows), tokenizer, max_length=64)


# --- cross-entropy ---


def test_cross_entropy_of_each_document(models, documents):
    measured = cross_entropy(models[0], documents, batch_size=3)["all"]
    for row, total, count in zip(documents, measured.sums, measured.counts, strict=True):
        ids = torch.tensor([row["input_ids"]])
        logits = models[0](ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert total.item() == pytest.approx(expected.item(), abs=1e-5)
        assert count == len(row["input_ids"]) - 1


def test_cross_entropy_of_answers():
    tokenizer, rows = prompts_and_completions()
    model = tiny_model(vocab_size=len(tokenizer), scale=3.0)
    measured = cross_entropy(model, rows)
    for i, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        answer = torch.tensor(row["completion_mask"][1:]).bool()
        assert measured["answer"].sums[i].item() == pytest.approx(losses[answer].sum().item(), abs=1e-5)
        assert measured["all"].sums[i].item() == pytest.approx(losses.sum().item(), abs=1e-5)
        assert measured["answer"].counts[i] == answer.sum() < measured["all"].counts[i]


def test_cross_entropy_needs_documents(models):
    with pytest.raises(ValueError, match="documents is empty"):
        cross_entropy(models[0], [])


# --- the curve, one by one ---


def rollout_of(model, prefix, noise, temperature):
    """One rollout by inverse transform sampling, a whole forward per token."""
    ids = prefix
    for u in noise:
        probs = (model(ids[None]).logits[0, -1] / temperature).softmax(-1)
        ids = torch.cat([ids, torch.searchsorted(probs.cumsum(-1), u[None], right=True)])
    return ids[len(prefix) :]


def last_feature(model, ids):
    hidden = model(ids[None], output_hidden_states=True).hidden_states
    feature = torch.cat([hidden[i][0, -1] for i in (1, 2, 3)])
    return (feature / feature.norm()).numpy()


@torch.no_grad()
def curve_one_by_one(model, phi, row, anchors, temperature):
    """Losses [contexts, lengths] of one document: each rollout on its own, cut off and embedded anew per length."""
    document = torch.tensor(row["input_ids"])
    N, G = SETTINGS["num_generations"], max(LENGTHS)
    layout = BlockLayout(
        len(document),
        1,
        1,
        G,
        torch.tensor([anchors]),
        torch.ones(1, len(anchors), dtype=torch.bool),
        torch.zeros(1, len(anchors), dtype=torch.long),
        torch.zeros(1, len(document), dtype=torch.long),
    )
    noise = sampling_uniforms(layout, torch.tensor([[row["document_id"]]]), N, seed=5, purpose=EVALUATION, step=0)[0]
    losses = []
    for anchor, uniforms in zip(anchors, noise, strict=True):
        prefix = document[:anchor]
        rollouts = [rollout_of(model, prefix, u, temperature) for u in uniforms]
        features = [[last_feature(phi, torch.cat([prefix, r[:length]])) for r in rollouts] for length in LENGTHS]
        references = [last_feature(phi, document[: anchor + length]) for length in LENGTHS]
        losses.append([oracles.u_statistic(x, y) for x, y in zip(features, references, strict=True)])
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_curve_equals_one_by_one(models, documents, temperature):
    model, phi = models
    curve = feature_matching_curve(
        model, FeatureNetwork(phi), documents, LENGTHS, temperature=temperature, seed=5, batch_size=2, **SETTINGS
    )
    anchors = {0: [3, 13], 1: [3, 26], 2: [3, 5]}  # the first and the last place with 4 tokens to come
    expected = torch.cat([curve_one_by_one(model, phi, documents[i], anchors[i], temperature) for i in anchors])
    torch.testing.assert_close(curve.values, expected, rtol=0, atol=1e-5)
    assert curve.documents.tolist() == [0, 0, 1, 1, 2, 2]


def test_curve_does_not_depend_on_batches_or_order(models, documents):
    model, phi = models
    network = FeatureNetwork(phi, pooling="mean_pooling")
    one = feature_matching_curve(model, network, documents, LENGTHS, batch_size=1, **SETTINGS)
    backwards = list(reversed(list(documents)))
    other = feature_matching_curve(model, network, backwards, LENGTHS, batch_size=4, **SETTINGS).by_document()
    torch.testing.assert_close(one.by_document().sums, other.sums, rtol=0, atol=1e-6)
    assert network.pooling == "mean_pooling"


@torch.no_grad()
def test_mean_over_all_rollouts_is_the_loss():
    """Unbiased at every length: the mean over all pairs of rollouts, enumerated, is || E phi - phi_y ||^2."""
    policy, phi = (tiny_model("gpt_neox", seed=s, vocab_size=VOCAB, pad_token_id=None, scale=3.0) for s in (0, 1))
    document, anchor, lengths = torch.tensor([0, 3, 1, 2, 2]), 3, (1, 2)
    pairs = COMPLETIONS[oracles.groups(len(COMPLETIONS), 2)]  # [256, 2, G]: one row of a batch each
    rows = document.expand(len(pairs), -1)
    layout = BlockLayout.from_documents(torch.zeros_like(rows), stride=1, context_length=anchor, completion_length=2)
    values = curve_values(FeatureNetwork(phi, pooling="token"), rows, pairs[:, None], layout, lengths)

    runs = torch.cat([document[:anchor].expand(len(COMPLETIONS), -1), COMPLETIONS], 1)
    log_probs = policy(runs).logits[:, anchor - 1 : -1].log_softmax(-1).gather(-1, COMPLETIONS[..., None])
    probs = log_probs.sum((1, 2)).exp()
    weights = (probs[:, None] * probs[None]).flatten()
    for column, length in enumerate(lengths):
        features = torch.from_numpy(np.stack([last_feature(phi, ids[: anchor + length]) for ids in runs]))
        reference = torch.tensor(last_feature(phi, document[: anchor + length]))
        exact = oracles.quadratic_loss(probs, features, reference)
        assert (weights @ values[:, column]).item() == pytest.approx(exact.item(), abs=1e-6)


def test_contexts_of_completions_start_behind_the_prompt():
    _, rows = prompts_and_completions()
    (batch,) = batches_of(rows, 8, "cpu")
    for per_document in (1, 3):
        layout = contexts(batch, per_document, context_length=1, completion_length=2)
        for row, mask in enumerate(batch["completion_mask"]):
            anchors = layout.anchors[row][layout.valid[row]].tolist()
            inside = mask.nonzero().flatten().tolist()
            assert anchors[0] == inside[0]
            assert len(anchors) == per_document
            assert anchors[-1] + 2 <= inside[-1] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=()), r"lengths=\(\)"),
        (dict(lengths=(0, 4)), r"lengths=\(0, 4\)"),
        (dict(num_generations=1), "num_generations=1"),
        (dict(lengths=(1, 64)), "none has room for 64 tokens"),
    ],
)
def test_curve_refuses(models, documents, change, message):
    model, phi = models
    with pytest.raises(ValueError, match=message):
        feature_matching_curve(model, FeatureNetwork(phi), documents, **{"lengths": LENGTHS, **SETTINGS, **change})


# --- intervals ---


def test_curve_mean_and_documents():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]], dtype=torch.float64)
    curve = FeatureCurve((1, 2), values, torch.tensor([4, 4, 7]))
    assert curve.by_document().sums.tolist() == [[4.0, 6.0], [8.0, 9.0]]
    assert curve.estimate().mean.tolist() == [4.0, 5.0]


def test_interval_resamples_whole_documents():
    """With three documents the bootstrap distribution is known: 27 equally likely draws."""
    data = DocumentMean(torch.tensor([3.0, 10.0, 40.0]), torch.tensor([1.0, 2.0, 4.0]))
    draws = list(itertools.product(range(3), repeat=3))
    means = torch.tensor([data.sums[list(d)].sum() / data.counts[list(d)].sum() for d in draws]).double()
    estimate = data.estimate(level=0.5, resamples=20_000)
    assert estimate.mean.item() == pytest.approx(53 / 7)
    # The quantiles of a discrete distribution: the sampled ones lie at or next to them.
    for found, q in ((estimate.low, 0.25), (estimate.high, 0.75)):
        assert means.quantile(q - 0.04) <= found <= means.quantile(q + 0.04)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 60, generator=generator, dtype=torch.float64)
    estimates = [DocumentMean(row, torch.ones(60)).estimate(resamples=400) for row in data]
    covered = sum(bool(e.low <= 0 <= e.high) for e in estimates)
    assert 0.90 * 400 <= covered <= 0.98 * 400  # four standard errors around .94


def test_difference_is_paired():
    """What two models share cancels: the interval of the difference is as narrow as the difference is constant."""
    generator = torch.Generator().manual_seed(0)
    shared, counts = torch.randn(50, generator=generator, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    one, other = DocumentMean(shared + 0.25, counts), DocumentMean(shared, counts)
    assert [x.item() for x in (one - other).estimate()] == pytest.approx([0.25] * 3)
    assert (one.estimate().high - one.estimate().low) > 0.3
    with pytest.raises(ValueError, match="same documents"):
        _ = one - DocumentMean(shared, 2 * counts)


def test_empty_mean_is_an_error():
    with pytest.raises(ValueError, match="counts are all zero"):
        DocumentMean(torch.zeros(2), torch.zeros(2)).estimate()
