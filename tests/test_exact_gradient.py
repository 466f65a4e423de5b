"""The estimator against the exact gradient, for a table policy with random features: see enumeration.py."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from ebft import advantages, losses
from ebft.kernels import Kernel, kernel_gram, ngram_gram
from ebft.rewards import Gram, feature_matching_rewards
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
    mean_over_groups,
    mean_per_token,
)

D = 5
COEFS = [(1.0, 1.0), (1.0, 0.0), (0.7, 0.4)]


class Table(NamedTuple):
    """A policy and an initial policy over all completions, and their features."""

    params: list[Tensor]  # logits of the first token [4], of the second given the first [4, 4]
    log_probs: Tensor  # [16, G]
    initial_log_probs: Tensor  # [16, G]
    phi: Tensor  # [16, D]
    ref: Tensor  # [D]
    token_phi: Tensor  # [16, G, D]: the feature of token t is a function of y_1..y_t
    token_ref: Tensor  # [G, D]


def table_log_probs(first: Tensor, second: Tensor) -> Tensor:
    y1, y2 = COMPLETIONS.T
    return torch.stack([first.log_softmax(-1)[y1], second.log_softmax(-1)[y1, y2]], -1)


@pytest.fixture
def table() -> Table:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = [normal(VOCAB).requires_grad_(), normal(VOCAB, VOCAB).requires_grad_()]
    token_phi = torch.stack([normal(VOCAB, D)[COMPLETIONS[:, 0]], normal(VOCAB**G, D)], 1)
    return Table(
        params=params,
        log_probs=table_log_probs(*params),
        initial_log_probs=table_log_probs(normal(VOCAB), normal(VOCAB, VOCAB)),
        phi=normal(VOCAB**G, D),
        ref=normal(D),
        token_phi=token_phi,
        token_ref=normal(G, D),
    )


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("coefs", COEFS)
@pytest.mark.parametrize("estimator", ["leave_one_out", "none"])
def test_unbiased(table, estimator, coefs, n):
    """The exact leave-one-out baseline, and no baseline, give the gradient of the feature-matching loss itself."""
    exact = exact_gradient(table.log_probs, table.phi, table.ref, table.params, *coefs)
    mean = mean_estimate(table.log_probs, table.phi, table.ref, table.params, n, estimator, *coefs)
    torch.testing.assert_close(mean, exact, **TOLERANCE)


def test_unbiased_without_a_group(table):
    """N = 1, alignment only."""
    exact = exact_gradient(table.log_probs, table.phi, table.ref, table.params, 1.0, 0.0)
    mean = mean_estimate(table.log_probs, table.phi, table.ref, table.params, 1, "none", 1.0, 0.0)
    torch.testing.assert_close(mean, exact, **TOLERANCE)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("coefs", COEFS)
def test_bias_of_plain_rloo(table, coefs, n):
    """Plain RLOO is the gradient with diversity_coef (n - 2) / (n - 1): for n = 2 no diversity at all."""
    alignment_coef, diversity_coef = coefs
    shrunk = exact_gradient(
        table.log_probs, table.phi, table.ref, table.params, alignment_coef, diversity_coef * (n - 2) / (n - 1)
    )
    mean = mean_estimate(table.log_probs, table.phi, table.ref, table.params, n, "rloo", *coefs)
    torch.testing.assert_close(mean, shrunk, **TOLERANCE)
    if diversity_coef:
        exact = exact_gradient(table.log_probs, table.phi, table.ref, table.params, *coefs)
        assert (mean - exact).norm() > 0.02 * exact.norm()


@pytest.mark.parametrize("estimator", ["leave_one_out", "rloo"])
def test_sampled_groups_agree_with_the_mean(table, estimator):
    """200,000 sampled groups of 4: every coordinate within 4.5 standard errors, all together by chi-square."""
    n, draws = 4, 200_000
    probs = table.log_probs.detach().sum(-1).exp()
    groups = torch.multinomial(probs, draws * n, replacement=True, generator=torch.Generator().manual_seed(1))
    groups = groups.reshape(draws, n)
    rewards = feature_matching_rewards(table.phi[groups], table.ref.expand(draws, -1), whitening="none")
    values = advantages.estimate(estimator, rewards)
    loss, _ = losses.policy_loss(
        table.log_probs[groups][None], values[None], torch.ones(1, draws, dtype=torch.bool), G * n * draws
    )
    mean = flat_gradient(loss, table.params)

    scores = torch.stack([flat_gradient(x, table.params) for x in table.log_probs.sum(-1)])
    per_group = -torch.einsum("mn,mnp->mp", values, scores[groups]) / (G * n)
    torch.testing.assert_close(per_group.mean(0), mean, **TOLERANCE)
    covariance = per_group.T.cov() / draws
    difference = mean - exact_gradient(table.log_probs, table.phi, table.ref, table.params)
    standard_errors = covariance.diagonal().sqrt()
    rank = 3 + 4 * 3  # logits are defined up to a constant per softmax
    chi_square = difference @ torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True) @ difference
    assert torch.linalg.matrix_rank(covariance, rtol=1e-9, hermitian=True) == rank
    if estimator == "leave_one_out":
        assert (difference.abs() < 4.5 * standard_errors).all()
        assert chi_square < 44.3  # 99.99 % of chi-square with 15 degrees of freedom
    else:  # the test has the power to see plain RLOO's bias
        assert (difference.abs() > 4.5 * standard_errors).any()
        assert chi_square > 1000


# Other kernels than the inner product ------------------------------------------------------------------------------

FREQUENCIES = torch.randn(D, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
KERNELS = {
    "linear": Kernel("linear"),
    "rbf": Kernel("rbf", bandwidths=(1.5,)),
    "sum of scales": Kernel("rbf", bandwidths=(0.5, 3.0)),
    "energy": Kernel("energy"),
    "characteristic": Kernel("characteristic", frequencies=FREQUENCIES),
    "ngram": Kernel("ngram", sizes=(1, 2)),
}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("coefs", COEFS)
@pytest.mark.parametrize("estimator", ["leave_one_out", "none"])
@pytest.mark.parametrize("name", KERNELS)
def test_unbiased_with_kernel(table, name, estimator, coefs, n):
    """The gradient of the squared MMD to the point mass at the reference, kernel values from plain loops."""
    kernel, reference = KERNELS[name], COMPLETIONS[6]
    options = dict(bandwidths=kernel.bandwidths, frequencies=kernel.frequencies, sizes=kernel.sizes)
    points = [*COMPLETIONS, reference] if name == "ngram" else [*table.phi, table.ref]
    matrix = oracles.kernel_matrix(points, lambda x, y: oracles.kernel_value(x, y, kernel.name, **options))
    values = Gram(*map(torch.from_numpy, (matrix[:-1, :-1], matrix[:-1, -1], np.array(matrix[-1, -1]))))
    exact = exact_kernel_gradient(table.log_probs, values, table.params, *coefs)
    assert exact.norm() > 1e-3

    def gram_of(groups: Tensor) -> Gram:
        if name == "ngram":
            return ngram_gram(COMPLETIONS[groups], reference.expand(len(groups), -1), kernel.sizes)
        return kernel_gram(table.phi[groups], table.ref.expand(len(groups), -1), kernel)

    mean = mean_kernel_estimate(table.log_probs, gram_of, table.params, n, estimator, *coefs)
    torch.testing.assert_close(mean, exact, **TOLERANCE)


# KL to the initial policy -----------------------------------------------------------------------------------------


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p||q) of the distributions of whole completions; arguments are per-token log-probabilities [16, G]."""
    p, q = p.sum(-1), q.sum(-1)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("n", [2, 3])
def test_k1_in_the_reward(table, n):
    """-k1 as a reward, minus the mean of the others: (1/G) grad KL(pi||ref)."""

    def loss_of(groups, log_probs, weights, denominator):
        k1 = losses.kl_estimate(log_probs, table.initial_log_probs[groups][None], "k1")
        return losses.policy_loss(log_probs, advantages.rloo(-k1), weights, denominator)[0]

    mean = mean_over_groups(table.log_probs, table.params, n, loss_of)
    exact = flat_gradient(kl_divergence(table.log_probs, table.initial_log_probs), table.params) / G
    torch.testing.assert_close(mean, exact, **TOLERANCE)


def test_k1_beside_the_feature_reward(table):
    """leave_one_out(rewards) - beta rloo(k1): (1/G) grad (L + beta KL(pi||ref)), the KL-regularised objective."""
    beta = 0.3

    def loss_of(groups, log_probs, weights, denominator):
        rewards = feature_matching_rewards(
            table.phi[groups][None], table.ref.expand(1, len(groups), -1), whitening="none"
        )
        k1 = losses.kl_estimate(log_probs, table.initial_log_probs[groups][None], "k1")
        values = advantages.leave_one_out(rewards) - beta * advantages.rloo(k1)
        return losses.policy_loss(log_probs, values, weights, denominator)[0]

    mean = mean_over_groups(table.log_probs, table.params, 3, loss_of)
    kl = flat_gradient(kl_divergence(table.log_probs, table.initial_log_probs), table.params) / G
    exact = exact_gradient(table.log_probs, table.phi, table.ref, table.params) + beta * kl
    torch.testing.assert_close(mean, exact, **TOLERANCE)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("n", [1, 2])
def test_k2_and_k3_as_losses(table, n, estimator):
    """k2: (1/G) grad KL(pi||ref). k3: (1/G) grad KL(ref||pi), which is another one."""

    def loss_of(groups, log_probs, weights, denominator):
        initial = table.initial_log_probs[groups][None]
        return losses.kl_loss(log_probs, initial, weights, denominator, estimator)[0]

    mean = mean_over_groups(table.log_probs, table.params, n, loss_of)
    forward = flat_gradient(kl_divergence(table.log_probs, table.initial_log_probs), table.params) / G
    reverse = flat_gradient(kl_divergence(table.initial_log_probs, table.log_probs), table.params) / G
    exact, other = (forward, reverse) if estimator == "k2" else (reverse, forward)
    torch.testing.assert_close(mean, exact, **TOLERANCE)
    assert (mean - other).norm() > 0.1 * other.norm()


def test_k1_as_a_loss_has_no_mean_gradient(table):
    def loss_of(groups, log_probs, weights, denominator):
        k1 = losses.kl_estimate(log_probs, table.initial_log_probs[groups][None], "k1")
        return (weights.unsqueeze(-1) * k1).sum() / denominator

    mean = mean_over_groups(table.log_probs, table.params, 2, loss_of)
    torch.testing.assert_close(mean, torch.zeros_like(mean), **TOLERANCE)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_per_token_kl_losses_are_neither_gradient(table, estimator):
    """Why the estimates are taken of the block: summed per token they ignore a token's effect on later states."""

    def loss_of(groups, log_probs, weights, denominator):
        per_token = losses.kl_estimate(
            log_probs.unsqueeze(-1), table.initial_log_probs[groups][None].unsqueeze(-1), estimator
        )
        return (weights[..., None, None] * per_token).sum() / denominator

    mean = mean_over_groups(table.log_probs, table.params, 1, loss_of)
    for p, q in ((table.log_probs, table.initial_log_probs), (table.initial_log_probs, table.log_probs)):
        exact = flat_gradient(kl_divergence(p, q), table.params) / G
        assert (mean - exact).norm() > 0.02 * exact.norm()


# Per-token rewards (pooling: token) -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("estimator", ["leave_one_out", "none"])
def test_per_token_rewards(table, n, estimator):
    """Reward-to-go gives (1/G) grad of the loss summed over tokens; each token's own reward alone does not."""
    arguments = (table.log_probs, table.token_phi, table.token_ref, table.params)
    exact = exact_per_token(*arguments)
    torch.testing.assert_close(mean_per_token(*arguments, n, estimator), exact, **TOLERANCE)
    own_only = mean_per_token(*arguments, n, estimator, to_go=False)
    assert (own_only - exact).norm() > 0.1 * exact.norm()
