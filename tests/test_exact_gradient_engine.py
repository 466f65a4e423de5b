"""The engine's gradient against the exact one: a language model over 4 tokens, see enumeration.py.

The library's side is `sample_blocks`, `block_log_probs` and `FeatureNetwork`; the exact side is plain forwards.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from ebft import BlockLayout, FeatureNetwork, advantages, block_log_probs, losses, sample_blocks
from ebft.kernels import Kernel
from ebft.noise import random_frequencies
from ebft.rewards import Gram, feature_matching_rewards
from ebft.rollout import Rollouts
from ebft.scoring import Scorer
from enumeration import (
    COMPLETIONS,
    TOLERANCE,
    VOCAB,
    G,
    exact_gradient,
    exact_kernel_gradient,
    exact_per_token,
    flat_gradient,
    mean_estimate,
    mean_kernel_estimate,
    mean_per_token,
)
from tiny_models import tiny_model

TEMPERATURE = 0.6
LAYOUT = BlockLayout(length=9, stride=3, context_length=3, completion_length=G)
K = LAYOUT.num_blocks
DOCUMENT = torch.tensor([[0, 3, 1, 2, 2, 0, 1, 3, 1]])


class Engine(NamedTuple):
    """What the library computes for all completions of every block, and the same from plain forwards (exact side)."""

    policy: torch.nn.Module
    params: Sequence[Tensor]
    directions: Tensor  # [parameters, 8]: gradients are compared along these
    features: Callable[[Tensor, str], tuple[Tensor, Tensor]]  # (tokens [B, K, N, G], pooling) -> FeatureNetwork's
    network: FeatureNetwork
    log_probs: Tensor  # [K, 16, G], plain forwards
    token_phi: Tensor  # [K, 16, G, D], plain forwards
    token_ref: Tensor  # [K, G, D], plain forwards


def plain_features(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Joint-normalised hidden states 1, 2, 3 of a 4-layer model at the last G tokens, [rows, G, D]."""
    hidden = model(ids, output_hidden_states=True).hidden_states
    features = torch.cat(hidden[1:4], -1)[:, -G:]
    return (features / features.norm(dim=-1, keepdim=True)).detach()


@pytest.fixture(scope="module")
def engine() -> Engine:
    # GPT-NeoX: its norms stay in double precision, where RMS norms round to float32. A padding token's embedding is 0.
    policy, frozen = (
        tiny_model("gpt_neox", seed=seed, vocab_size=VOCAB, pad_token_id=None, scale=3.0) for seed in (0, 1)
    )
    params = list(policy.parameters())
    log_probs, token_phi, token_ref = [], [], []
    for anchor in LAYOUT.anchors.tolist():
        ids = torch.cat([DOCUMENT[:, :anchor].expand(len(COMPLETIONS), -1), COMPLETIONS], 1)
        distributions = (policy(ids).logits[:, -G - 1 : -1] / TEMPERATURE).log_softmax(-1)
        log_probs.append(distributions.gather(-1, COMPLETIONS.unsqueeze(-1)).squeeze(-1))
        token_phi.append(plain_features(frozen, ids))
        token_ref.append(plain_features(frozen, DOCUMENT[:, : anchor + G])[0])
    generator = torch.Generator().manual_seed(0)
    return Engine(
        policy=policy,
        params=params,
        directions=torch.randn(sum(p.numel() for p in params), 8, generator=generator, dtype=torch.float64),
        features=lambda tokens, pooling: FeatureNetwork(frozen, pooling=pooling)(
            DOCUMENT.expand(len(tokens), -1), tokens, LAYOUT
        ),
        network=FeatureNetwork(frozen),
        log_probs=torch.stack(log_probs),
        token_phi=torch.stack(token_phi),
        token_ref=torch.stack(token_ref),
    )


def mean_over_blocks(per_block: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(per_block)).mean(0)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("estimator", ["leave_one_out", "none", "rloo"])
def test_engine_gradient(engine, estimator, n):
    """block_log_probs and FeatureNetwork on all completions at once: the mean gradient of a step, all parameters."""
    tokens = COMPLETIONS.expand(1, K, -1, -1)
    log_probs = block_log_probs(engine.policy, DOCUMENT, tokens, LAYOUT, temperature=TEMPERATURE)[0]
    gen, ref = (x[0] for x in engine.features(tokens, "last_token"))
    mean = mean_over_blocks(
        [mean_estimate(log_probs[k], gen[k], ref[k], engine.params, n, estimator) for k in range(K)]
    )
    diversity_coef = (n - 2) / (n - 1) if estimator == "rloo" else 1.0
    exact = mean_over_blocks(
        [
            exact_gradient(
                engine.log_probs[k],
                engine.token_phi[k, :, -1],
                engine.token_ref[k, -1],
                engine.params,
                diversity_coef=diversity_coef,
            )
            for k in range(K)
        ]
    )
    assert exact.norm() > 1e-2
    torch.testing.assert_close(mean, exact, **TOLERANCE)


KERNELS = {
    "rbf": Kernel("rbf", bandwidths=(0.4, 1.0)),
    "energy": Kernel("energy"),
    "characteristic": Kernel("characteristic", frequencies=random_frequencies(96, 8, (0.5,), seed=1)),
    "ngram": Kernel("ngram", sizes=(1, 2)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_engine_gradient_with_kernel(engine, name):
    """`Scorer` on all completions at once: the mean gradient of a step is that of the enumerated squared MMD."""
    kernel, n = KERNELS[name], 2
    tokens = COMPLETIONS.expand(1, K, -1, -1)
    log_probs = block_log_probs(engine.policy, DOCUMENT, tokens, LAYOUT, temperature=TEMPERATURE)[0]
    network = None if name == "ngram" else engine.network
    values, _ = Scorer(network, kernel, {"whitening": "none"})(DOCUMENT, Rollouts(tokens, tokens, tokens), LAYOUT)
    options = dict(bandwidths=kernel.bandwidths, frequencies=kernel.frequencies, sizes=kernel.sizes)
    means, exacts = [], []
    for k, anchor in enumerate(LAYOUT.anchors.tolist()):
        all_values, cross, reference = (value[0, k] for value in values)

        def gram_of(groups: Tensor, K=all_values, g=cross, q=reference) -> Gram:
            return Gram(K[groups[:, :, None], groups[:, None, :]], g[groups], q.expand(len(groups)))

        means.append(mean_kernel_estimate(log_probs[k], gram_of, engine.params, n, "leave_one_out"))
        points = [*engine.token_phi[k, :, -1], engine.token_ref[k, -1]]
        if name == "ngram":
            points = [*COMPLETIONS, DOCUMENT[0, anchor : anchor + G]]
        matrix = oracles.kernel_matrix(points, lambda x, y: oracles.kernel_value(x, y, kernel.name, **options))
        exact = Gram(*map(torch.from_numpy, (matrix[:-1, :-1], matrix[:-1, -1], np.array(matrix[-1, -1]))))
        exacts.append(exact_kernel_gradient(engine.log_probs[k], exact, engine.params))
    exact = mean_over_blocks(exacts)
    assert exact.norm() > 1e-2
    torch.testing.assert_close(mean_over_blocks(means), exact, **TOLERANCE)


def test_engine_sampled_step(engine):
    """sample_blocks -> features -> rewards -> advantages -> loss, 2,000 groups of 4 per block, within the error."""
    B, groups, n = 125, 16, 4  # rows (copies of the document), groups per block, rollouts per group
    documents = DOCUMENT.expand(B, -1)
    support = {"temperature": TEMPERATURE}
    generator = torch.Generator().manual_seed(3)
    tokens = sample_blocks(
        engine.policy, documents, LAYOUT, num_generations=groups * n, generator=generator, **support
    )
    gen, ref = engine.features(tokens, "last_token")
    log_probs = block_log_probs(engine.policy, documents, tokens, LAYOUT, **support)

    gen, ref = gen.unflatten(2, (groups, n)), ref.unsqueeze(2).expand(-1, -1, groups, -1)
    values = advantages.leave_one_out(feature_matching_rewards(gen, ref, whitening="none"))  # [B, K, groups, n]
    loss, _ = losses.policy_loss(
        log_probs.unflatten(2, (groups, n)).flatten(1, 2),  # every group as a block
        values.flatten(1, 2),
        torch.ones(B, K * groups, dtype=torch.bool),
        denominator=G * n * B * K * groups,
    )
    mean = flat_gradient(loss, engine.params) @ engine.directions

    exact, covariance = torch.zeros_like(mean), torch.zeros(8, 8, dtype=torch.float64)
    drawn = (tokens @ torch.tensor([VOCAB, 1])).unflatten(2, (groups, n))  # which completion: [B, K, groups, n]
    for k in range(K):
        scores = torch.stack([flat_gradient(x, engine.params) for x in engine.log_probs[k].sum(-1)])
        per_group = torch.einsum("bgn,bgnp->bgp", values[:, k], (scores @ engine.directions)[drawn[:, k]]) / (
            G * n * K
        )
        covariance += per_group.flatten(0, 1).T.cov() / (B * groups)
        phi, ref_k = engine.token_phi[k, :, -1], engine.token_ref[k, -1]
        exact += exact_gradient(engine.log_probs[k], phi, ref_k, engine.params) @ engine.directions / K
    difference, standard_errors = mean - exact, covariance.diagonal().sqrt()
    assert (exact.abs() > 10 * standard_errors).any()  # the sample is large enough to say something
    assert (difference.abs() < 4.5 * standard_errors).all()
    assert difference @ torch.linalg.solve(covariance, difference) < 31.9  # 99.99 %, 8 degrees of freedom


@pytest.mark.parametrize("n", [2, 3])
def test_engine_per_token_rewards(engine, n):
    """pooling="token" with reward-to-go: the gradient of the loss summed over the block's tokens."""
    tokens = COMPLETIONS.expand(1, K, -1, -1)
    log_probs = block_log_probs(engine.policy, DOCUMENT, tokens, LAYOUT, temperature=TEMPERATURE)[0]
    gen_KGND, ref_KGD = (x[0] for x in engine.features(tokens, "token"))
    mean = mean_over_blocks(
        [mean_per_token(log_probs[k], gen_KGND[k].transpose(0, 1), ref_KGD[k], engine.params, n) for k in range(K)]
    )
    exact = mean_over_blocks(
        [
            exact_per_token(engine.log_probs[k], engine.token_phi[k], engine.token_ref[k], engine.params)
            for k in range(K)
        ]
    )
    torch.testing.assert_close(mean, exact, **TOLERANCE)
