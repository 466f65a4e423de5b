"""Enumeration: exact gradients, and the exact mean of an estimate over all groups of completions.

With a vocabulary of 4 and G = 2 there are 16 completions, so the feature-matching loss is a closed form of the
policy's parameters, and 16^n groups, so the *mean* of the policy-gradient estimate is a finite sum: no sampling noise
at all. Each group enters the library's own functions as one block whose weight is the group's probability; the
gradient of `policy_loss` is then exactly the expected gradient of a step. All in double precision.

Everything here is for one context and any policy: it needs the log-probabilities [16, G] of all completions, with a
graph down to `params`, and their features [16, D].
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from ebft import advantages, losses
from ebft.rewards import Gram, Rewards, feature_matching_rewards, rewards_from_gram

VOCAB, G = 4, 2
COMPLETIONS = oracles.completions(VOCAB, G)  # [16, G]
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def flat_gradient(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])


def exact_gradient(
    log_probs: Tensor, phi: Tensor, ref: Tensor, params: Sequence[Tensor], alignment_coef=1.0, diversity_coef=1.0
) -> Tensor:
    """(1/G) grad of the feature-matching loss: what the policy loss promises (its denominator counts tokens)."""
    probs = log_probs.sum(-1).exp()
    return flat_gradient(oracles.quadratic_loss(probs, phi, ref, alignment_coef, diversity_coef), params) / G


def mean_over_groups(
    log_probs: Tensor, params: Sequence[Tensor], n: int, loss_of: Callable[[Tensor, Tensor, Tensor, float], Tensor]
) -> Tensor:
    """Expected gradient of a loss over all groups of n completions drawn from the policy.

    loss_of(groups [M, n], log_probs [1, M, n, G], weights [1, M], denominator) -> scalar; the groups are the blocks.
    """
    groups = oracles.groups(len(log_probs), n)
    weights = log_probs.detach().sum(-1)[groups].sum(-1).exp()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    return flat_gradient(loss_of(groups, log_probs[groups][None], weights[None], G * n), params)


def mean_estimate(
    log_probs: Tensor,
    phi: Tensor,
    ref: Tensor,
    params: Sequence[Tensor],
    n: int,
    estimator: str,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
) -> Tensor:
    """Expected gradient of rewards -> advantages -> policy_loss, without whitening."""
    coefs: dict[str, Any] = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef}

    def loss_of(groups, log_probs_BKNG, weights, denominator):
        rewards = feature_matching_rewards(
            phi[groups][None], ref.expand(1, len(groups), -1), whitening="none", **coefs
        )
        values = advantages.estimate(estimator, rewards, **coefs)
        return losses.policy_loss(log_probs_BKNG, values, weights, denominator)[0]

    return mean_over_groups(log_probs, params, n, loss_of)


def exact_kernel_gradient(
    log_probs: Tensor, values: Gram, params: Sequence[Tensor], alignment_coef=1.0, diversity_coef=1.0
) -> Tensor:
    """(1/G) grad of the squared MMD; values are k between all completions [16, 16], with the reference [16], of it."""
    probs = log_probs.sum(-1).exp()
    return flat_gradient(oracles.mmd_loss(probs, *values, alignment_coef, diversity_coef), params) / G


def mean_kernel_estimate(
    log_probs: Tensor,
    gram_of: Callable[[Tensor], Gram],
    params: Sequence[Tensor],
    n: int,
    estimator: str,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
) -> Tensor:
    """As `mean_estimate`, of any kernel: gram_of(groups [M, n]) are the kernel values of these groups."""
    coefs: dict[str, Any] = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef}

    def loss_of(groups, log_probs_BKNG, weights, denominator):
        rewards = rewards_from_gram(gram_of(groups), whitening="none", **coefs)
        values = advantages.estimate(estimator, rewards, **coefs)[None]
        return losses.policy_loss(log_probs_BKNG, values, weights, denominator)[0]

    return mean_over_groups(log_probs, params, n, loss_of)


def mean_per_token(
    log_probs: Tensor,
    token_phi: Tensor,
    token_ref: Tensor,
    params: Sequence[Tensor],
    n: int,
    estimator="leave_one_out",
    to_go=True,
) -> Tensor:
    """Expected gradient with one reward per token; token_phi [16, G, D], token_ref [G, D]."""

    def loss_of(groups, log_probs_BKNG, weights, denominator):
        gen_BKGND = token_phi[groups][None].transpose(2, 3)
        ref_BKGD = token_ref.expand(1, len(groups), -1, -1)
        rewards = feature_matching_rewards(gen_BKGND, ref_BKGD, whitening="none")
        if to_go:
            rewards = Rewards(*map(advantages.reward_to_go, rewards))
        values_BKNG = advantages.estimate(estimator, rewards).mT
        return losses.policy_loss(log_probs_BKNG, values_BKNG, weights, denominator)[0]

    return mean_over_groups(log_probs, params, n, loss_of)


def exact_per_token(log_probs: Tensor, token_phi: Tensor, token_ref: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(1/G) grad of the sum over t of the feature-matching loss of token t."""
    return torch.stack([exact_gradient(log_probs, token_phi[:, t], token_ref[t], params) for t in range(G)]).sum(0)
