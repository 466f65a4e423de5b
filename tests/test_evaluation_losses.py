"""Cross-entropy and feature-matching loss of documents, against one context, one rollout and one length at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

import held_out
import oracles
from ebft import BlockLayout, FeatureNetwork
from ebft.data import tokenize_documents
from ebft.evaluation import DocumentSettings, document_means
from ebft.evaluation.batches import batches_of
from ebft.evaluation.contexts import random_contexts
from ebft.evaluation.feature_matching import feature_matching_sums, kernels_of
from ebft.noise import EVALUATION, sampling_uniforms
from enumeration import COMPLETIONS, VOCAB
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

LENGTHS = (1, 2, 4)
SETTINGS = dict(num_generations=3, contexts_per_document=3, context_length=3)
CE = DocumentSettings(("cross_entropy",), batch_size=3)


def loss_settings(**change):
    return DocumentSettings(**{"measures": ("feature_matching",), "lengths": LENGTHS, **SETTINGS, **change})


@pytest.fixture(scope="module")
def models():
    return held_out.model_and_network()


@pytest.fixture(scope="module")
def documents():
    return held_out.raw_documents()


def prompts_and_completions():
    rows = [
        {"prompt": "the quick brown", "completion": " fox jumps"},
        {"prompt": "the dog", "completion": " sleeps; the"},
    ]
    tokenizer = byte_bpe_tokenizer()
    return tokenizer, list(tokenize_documents(Dataset.from_list(rows), tokenizer, max_length=64))


# --- cross-entropy ---


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cross_entropy_of_each_document(models, documents, temperature):
    """At temperature 1, whatever that of the rollouts."""
    measured = document_means(models[0], None, documents, replace(CE, temperature=temperature))["cross_entropy/all"]
    for row, total, count in zip(documents, measured.sums, measured.counts, strict=True):
        ids = torch.tensor([row["input_ids"]])
        logits = models[0](ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert total.item() == pytest.approx(expected.item(), abs=1e-5)
        assert count == len(row["input_ids"]) - 1


def test_cross_entropy_of_answers():
    tokenizer, rows = prompts_and_completions()
    model = tiny_model(vocab_size=len(tokenizer), scale=3.0)
    measured = document_means(model, None, rows, CE)
    for i, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        answer = torch.tensor(row["completion_mask"][1:]).bool()
        assert measured["cross_entropy/answer"].sums[i].item() == pytest.approx(losses[answer].sum().item(), abs=1e-5)
        assert measured["cross_entropy/all"].sums[i].item() == pytest.approx(losses.sum().item(), abs=1e-5)
        assert measured["cross_entropy/answer"].counts[i] == answer.sum() < measured["cross_entropy/all"].counts[i]


def test_documents_are_needed(models):
    with pytest.raises(ValueError, match="documents is empty"):
        document_means(models[0], None, [], CE)


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
def test_losses_equal_one_by_one(models, documents, temperature):
    model, phi = models
    settings = loss_settings(temperature=temperature, seed=5, batch_size=2)
    found = document_means(model, FeatureNetwork(phi), documents, settings)["feature_matching_loss"]
    (batch,) = batches_of(documents, 8, "cpu")
    layout = random_contexts(batch, 3, 3, max(LENGTHS), seed=5)
    assert layout.valid.sum(-1).tolist() == [3, 3, 2, 0] == found.counts.tolist()
    for i in range(3):
        anchors = layout.anchors[i][layout.valid[i]].tolist()
        expected = curve_one_by_one(model, phi, documents[i], anchors, temperature).sum(0)
        torch.testing.assert_close(found.sums[i], expected, rtol=0, atol=2e-5)


def test_losses_of_models_whose_rows_cannot_branch(documents):
    """Each of their rollouts is a row of its own."""
    models = [tiny_model("bamba", seed=seed, scale=1.5) for seed in (0, 1)]
    test_losses_equal_one_by_one(models, documents, 1.0)
    test_cross_entropy_of_each_document(models, documents, 1.0)


def test_pooling_of_the_network_is_not_used_nor_changed(models, documents):
    model, phi = models
    network = FeatureNetwork(phi, pooling="mean_pooling")
    one, other = (
        document_means(model, some, documents, loss_settings())["feature_matching_loss"].sums
        for some in (network, FeatureNetwork(phi))
    )
    assert torch.equal(one, other)
    assert network.pooling == "mean_pooling"


def test_losses_do_not_depend_on_batches_or_order(models, documents):
    model, phi = models
    one, other = (
        document_means(model, FeatureNetwork(phi), rows, loss_settings(batch_size=size))["feature_matching_loss"].sums
        for rows, size in ((documents, 1), (documents[::-1], 4))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_mean_over_all_rollouts_is_the_loss():
    """Unbiased at every length: the mean over all pairs of rollouts, enumerated, is || E phi - phi_y ||^2."""
    policy, phi = (tiny_model("gpt_neox", seed=s, vocab_size=VOCAB, pad_token_id=None, scale=3.0) for s in (0, 1))
    document, anchor, lengths = torch.tensor([0, 3, 1, 2, 2]), 3, (1, 2)
    pairs = COMPLETIONS[oracles.groups(len(COMPLETIONS), 2)]  # [256, 2, G]: one row of a batch each
    rows = document.expand(len(pairs), -1)
    layout = BlockLayout.from_documents(torch.zeros_like(rows), stride=1, context_length=anchor, completion_length=2)
    inputs = FeatureNetwork(phi, pooling="token"), rows, pairs[:, None], layout, lengths
    found, _ = feature_matching_sums(*inputs, kernels_of({}))
    values, counts = found["feature_matching_loss"]
    assert counts.tolist() == [1] * len(pairs)

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
        layout = random_contexts(batch, per_document, 1, 2, seed=0)
        for row, mask in enumerate(batch["completion_mask"]):
            anchors = layout.anchors[row][layout.valid[row]].tolist()
            inside = mask.nonzero().flatten().tolist()
            assert anchors[0] == inside[0]
            assert len(anchors) == per_document
            assert max(anchors) + 2 < inside[-1] + 1
