"""Policy-gradient loss, cross-entropy, KL divergence, their sum -> (loss, metrics); and coefficient schedules.

Shapes: B documents (rows), K blocks, N rollouts, G generated tokens, P document tokens.

Every loss is a weighted sum divided by a denominator of the *whole optimiser step* (all micro-batches, all ranks):
added up over micro-batches it is the step's loss, and so are the metrics. Weights and denominators depend on the
documents only, so both are known before sampling:

    weights_BK = loss_weights(valid_BK, mode)           denominator = G * N * (the step's sum of weights_BK)
    weights_BP = loss_weights(loss_mask_BP, mode)       denominator = the step's sum of weights_BP

Whatever stands where a weight is 0, NaN included, touches neither a value nor a gradient.
"""

import math

import torch
from torch import Tensor

Metrics = dict[str, Tensor]

LOSS_NORMALIZATIONS = ("token", "document")
KL_ESTIMATORS = ("k1", "k2", "k3")
DECAYS = ("none", "linear", "cosine")


def loss_weights(mask: Tensor, mode: str = "token", documents: Tensor | None = None) -> Tensor:
    """Weight of every token or block in its loss, float64, shaped as the mask; 0 where the mask is False.

    Args:
        mask: what is trained on, bool [B, M]: tokens [B, P-1] or blocks [B, K]. A CPU tensor, as collated.
        mode: "token": all equal. "document": the mean of each document, then over the documents that have any (the
            released code's reduction); the same as "token" where documents are equally long.
        documents: which document of its row each entry belongs to, 0, 1, ..., [B, M], anything where the mask is
            False; None where a row is one document.

    Returns:
        weights [B, M], whose sum is the number of entries ("token") or of documents with any ("document").

    Raises:
        ValueError: if the mode is unknown.
    """
    weights = mask.double()
    if mode not in LOSS_NORMALIZATIONS:
        raise ValueError(f"loss_normalization={mode!r} is unknown: use one of {', '.join(LOSS_NORMALIZATIONS)}.")
    if mode == "token":
        return weights
    if documents is None or not mask.numel():
        return weights / weights.sum(-1, keepdim=True).clamp(min=1)
    documents = torch.where(mask, documents, 0)
    counts = weights.new_zeros(len(mask), int(documents.max()) + 1).scatter_add(-1, documents, weights)
    return weights / counts.gather(-1, documents).clamp(min=1)


def policy_loss(
    log_probs_BKNG: Tensor, advantages: Tensor, weights_BK: Tensor, denominator: float
) -> tuple[Tensor, Metrics]:
    """REINFORCE on fresh rollouts: sum of -A log p over blocks, rollouts and tokens, over the denominator.

    One update per batch of rollouts: no ratio, no clip. With G N (blocks of the step) as denominator its gradient is
    (1/G) times the mean over blocks of that of the feature-matching loss, in expectation.

    Args:
        log_probs_BKNG: log-probabilities of the sampled tokens at the sampling temperature, with gradient.
        advantages: constants, [B, K, N] (every token of a rollout gets the same) or [B, K, N, G].
        weights_BK: bool or float, 0 for a block that does not exist.
        denominator: G * N * sum of weights_BK over the optimiser step.
    """
    if advantages.dim() == log_probs_BKNG.dim() - 1:
        advantages = advantages.unsqueeze(-1)
    weights = weights_BK[..., None, None].to(log_probs_BKNG)
    advantages = advantages.detach().to(log_probs_BKNG)
    loss = _weighted_mean(-advantages * _masked(log_probs_BKNG, weights), weights, denominator)
    return loss, {"policy_loss": loss.detach()}


def cross_entropy(doc_log_probs: Tensor, weights: Tensor, denominator: float) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the document tokens: sum of -log p over the denominator, at temperature 1.

    Args:
        doc_log_probs: log-probability of each document token but the first, [B, P-1], with gradient.
        weights: bool or float [B, P-1], 0 for what is not trained on (padding, prompt).
        denominator: sum of the weights over the optimiser step.
    """
    loss = _weighted_mean(-doc_log_probs, weights.to(doc_log_probs), denominator)
    return loss, {"ce_loss": loss.detach()}


def kl_estimate(log_probs_BKNG: Tensor, ref_log_probs_BKNG: Tensor, estimator: str) -> Tensor:
    """Estimate of the KL divergence between policy and initial policy, one per rollout, [B, K, N].

    With r = log ref(block) - log pi(block), the log-probabilities summed over the block's tokens:

        k1 = -r               mean KL(pi||ref), and no gradient in the mean: it belongs into the *reward*
                              (advantages - beta * rloo(k1)), which gives grad KL(pi||ref)
        k2 = r^2 / 2          as a loss term gives grad KL(pi||ref)
        k3 = exp(r) - 1 - r   as a loss term gives grad KL(ref||pi), another divergence

    The three are taken of the block as a whole. Summing k2 or k3 per token drops the effect of a token on the states
    after it: neither of the two gradients.

    Raises:
        ValueError: if the estimator is unknown.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={estimator!r} is unknown: use one of {', '.join(KL_ESTIMATORS)}.")
    r = (ref_log_probs_BKNG - log_probs_BKNG).sum(-1)
    if estimator == "k1":
        return -r
    return r.square() / 2 if estimator == "k2" else r.expm1() - r


def kl_loss(
    log_probs_BKNG: Tensor,
    ref_log_probs_BKNG: Tensor,
    weights_BK: Tensor,
    denominator: float,
    estimator: str = "k2",
) -> tuple[Tensor, Metrics]:
    """k2 or k3 as a loss term; arguments and denominator as in `policy_loss`, so beta means the same as with k1.

    Raises:
        ValueError: if the estimator is k1 or unknown.
    """
    if estimator == "k1":
        raise ValueError("kl_estimator='k1' has no mean gradient as a loss: subtract it from the reward, or use k2.")
    weights = weights_BK[..., None, None].to(log_probs_BKNG)
    estimate = kl_estimate(_masked(log_probs_BKNG, weights), ref_log_probs_BKNG.detach(), estimator)
    loss = _weighted_mean(estimate, weights.squeeze(-1), denominator)
    return loss, {"kl_loss": loss.detach()}


def mixed_loss(
    policy: Tensor,
    cross_entropy: Tensor,
    kl: Tensor | None = None,
    *,
    rl_coef: float,
    ce_coef: float,
    beta: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """rl_coef (policy + beta kl) + ce_coef cross_entropy: the mixed objective L_FM + gamma L_CE, gamma = `ce_coef`.

    beta sits within rl_coef, as it does by itself where the KL is part of the reward (k1, then pass no `kl`). The
    policy's gradient carries a factor 1/G (see `policy_loss`), the cross-entropy's does not: read gamma accordingly.
    """
    loss = rl_coef * (policy if kl is None else policy + beta * kl) + ce_coef * cross_entropy
    return loss, {"loss": loss.detach()}


def coefficient_at(step: int, total_steps: int, coef: float, *, warmup_steps: int = 0, decay: str = "none") -> float:
    """Coefficient of a loss term at an optimiser step (from 0): linear warm-up to `coef`, then decay to 0.

    Warm-up gives (step + 1) / (warmup_steps + 1) of it, so that no rollout is sampled for a coefficient of 0. Decay
    ("none", "linear" or "cosine") starts where the warm-up ends and reaches 0 at total_steps, one step past the last.

    Raises:
        ValueError: if the decay is unknown.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} is unknown: use one of {', '.join(DECAYS)}.")
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    progress = min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    if decay == "linear":
        return coef * warmup * (1.0 - progress)
    return coef * warmup * (1.0 + math.cos(math.pi * progress)) / 2 if decay == "cosine" else coef * warmup


def _masked(x: Tensor, weights: Tensor) -> Tensor:
    """x, and 0 where the weight is 0, in the gradient too.

    A product with the weight would not do: 0 * NaN is NaN. Masking the result keeps NaN out of the value, masking the
    log-probs as they come in keeps the backward's 0 * NaN out of their gradient.
    """
    return torch.where(weights != 0, x, 0.0)


def _weighted_mean(x: Tensor, weights: Tensor, denominator: float) -> Tensor:
    # The denominator is 0 only in a step with nothing to train on, whose sum is 0 as well.
    return (weights * _masked(x, weights)).sum() / (denominator or 1.0)
