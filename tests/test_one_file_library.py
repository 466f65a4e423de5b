"""Holds the library against the one-file example on the same noise: tokens, features, loss, gradients of a batch."""

# ruff: noqa: F811  (pytest fixtures are arguments with the name of an import)

import dataclasses

import pytest
import torch

from ebft import BlockLayout, FeatureNetwork, advantages, document_and_block_log_probs, losses, rewards, sample_blocks
from test_one_file import VOCABULARY, config, model, one, tiny_model, uniforms_for  # noqa: F401  (fixtures)

LENGTHS = (23, 5, 31, 14)  # the second is too short for a block


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded(documents):
    """`input_ids` and `doc_ids` [B, P]."""
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    doc_ids = [torch.zeros_like(document) for document in documents]
    return ids, torch.nn.utils.rnn.pad_sequence(doc_ids, batch_first=True, padding_value=-1)


def library_loss(model, phi, documents, noises, config):
    """What `one.ebft_loss` computes, by the library, on one padded batch: (loss, tokens, features)."""
    G, n = config.completion_length, config.num_generations
    ids, doc_ids = padded(documents)
    sizes = dict(stride=config.stride, context_length=config.context_length, completion_length=G)
    layout = BlockLayout.from_documents(doc_ids, **sizes)
    uniforms = torch.zeros(len(documents), layout.num_blocks, n, G, dtype=torch.float64)
    for row, noise in enumerate(noises):
        uniforms[row, : len(noise)] = noise
    tokens = sample_blocks(model, ids, layout, n, temperature=config.temperature, uniforms=uniforms)
    generated, reference = FeatureNetwork(phi)(ids, tokens, layout)
    coefs = dict(alignment_coef=config.alignment_coef, diversity_coef=config.diversity_coef)
    r = rewards.feature_matching_rewards(generated, reference, whitening=config.whitening, **coefs)
    log_probs = document_and_block_log_probs(model, ids, tokens, layout, temperature=config.temperature)
    weights = losses.loss_weights(layout.valid)
    policy, _ = losses.policy_loss(
        log_probs.blocks, advantages.leave_one_out(r, **coefs), weights, G * n * float(weights.sum())
    )
    within = (doc_ids[:, 1:] >= 0).double()
    ce, _ = losses.cross_entropy(log_probs.document, within, float(within.sum()))
    return config.rl_coef * policy + config.ce_coef * ce, tokens, (generated, reference)


@pytest.mark.parametrize("whitening", ["none", "paper"])
def test_loss_and_gradients_are_the_library_s(one, model, documents, config, whitening):
    config = dataclasses.replace(config, whitening=whitening, alignment_coef=0.9, diversity_coef=0.6)
    phi = tiny_model(seed=7).requires_grad_(False)
    noises = uniforms_for(one, documents, config)
    slow, _ = one.ebft_loss(model, phi, documents, noises, config)
    fast, tokens, (generated, reference) = library_loss(model, phi, documents, noises, config)
    for row, (document, noise) in enumerate(zip(documents, noises, strict=True)):
        K = len(noise)
        if not K:
            assert len(document) < config.context_length + config.completion_length
            continue
        sizes = (config.context_length, config.stride, config.completion_length)
        anchors = one.block_anchors(len(document), *sizes)
        assert torch.equal(tokens[row, :K], one.sample(model, document, anchors, noise, config.temperature))
        found = one.features(phi, document, tokens[row, :K], anchors)
        for a, b in zip((generated[row, :K], reference[row, :K]), found, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.double(), slow.double(), rtol=0, atol=1e-9)
    parameters = list(model.parameters())
    fast, slow = (torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters)]) for x in (fast, slow))
    # RMSNorm computes in float32 whatever the model's dtype.
    assert (fast - slow).abs().max() < 2e-6 * slow.abs().max()
    assert slow.abs().max() > 1e-3
