"""Gram matrices, whitening, alignment, diversity and the feature-matching loss of arXiv 2603.12248.

Shapes: n rollouts of one context (N), D features; any leading dimensions, usually [B, K] (documents, blocks), or
[B, K, G] with one feature per token. Everything is a function of the small Gram matrix of a group, so nothing here
ever takes an SVD in D dimensions. Letters as in the formulas: X [n, D] the rollouts' features, phi_y [D] the
reference's, K = X X^T, g = X phi_y, q = phi_y . phi_y.

Results are float64: they are a few numbers per rollout, so they cost nothing, and baselines subtract nearly equal
numbers. They live on the features' device, or on the CPU where that device has no float64 (mps); the loss functions
cast and move them. Nothing here is differentiable: a reward is a constant of the policy gradient, and eigenvectors of
repeated eigenvalues (duplicates) have no derivative.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WHITENINGS = ("none", "paper", "released")
ALIGNMENTS = ("dot", "cosine")

# A direction of X counts as absent when its singular value is below 1e-5 of the largest (released code). The
# eigenvalues of K = X X^T are the squared singular values, hence the square. Duplicates leave eigenvalues of about
# 1e-16 of the largest in a float64 Gram matrix, well below that line, but of about 1e-7 in a float32 one: above it.
RELATIVE_TOLERANCE = 1e-5**2


class Gram(NamedTuple):
    """All inner products within one group: K, g and q of the module's legend, float64."""

    rollouts: Tensor  # K [..., n, n]
    cross: Tensor  # g [..., n]
    reference: Tensor  # q [...]


class Rewards(NamedTuple):
    """Rewards of a group, each [..., n]; eq 6-7 with their factor 2 in `alignment` and `diversity`."""

    total: Tensor  # alignment_coef * alignment - diversity_coef * diversity
    alignment: Tensor
    diversity: Tensor


@torch.no_grad()
def gram_matrices(gen: Tensor, ref: Tensor) -> Gram:
    """Inner products of the rollouts' features gen [..., n, D] and the reference's ref [..., D], in float64.

    Rollouts with the same tokens must come with bit-identical features (share them or deduplicate by token ids):
    whitening blows rounding noise between them up into a direction of its own.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    gen, ref = checked_group(gen, ref)
    return Gram(gen @ gen.mT, (gen @ ref.unsqueeze(-1)).squeeze(-1), ref.square().sum(-1))


def feature_matching_rewards(
    gen: Tensor,
    ref: Tensor,
    *,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    whitening: str = "paper",
    alignment: str | None = None,
) -> Rewards:
    """Reward of every rollout: 2 phi_j . phi_y - (2 / (n - 1)) sum_{j' != j} phi_j . phi_j'  (eq 6-7).

    Args:
        gen: features of the rollouts, [..., n, D]; with one feature per token [B, K, G, n, D].
        ref: features of the reference, [..., D].
        alignment_coef: weight of the alignment term.
        diversity_coef: weight of the diversity term (alpha in the paper).
        whitening: "none" (plain dots: the exact gradient), "paper" (eq 8-9, variant (i) eq 49) or "released" (as in
            the authors' code, which leaves the reference unwhitened).
        alignment: "dot" or "cosine"; None is "dot" without whitening. The whitened forms are cosines by definition.

    Returns:
        Rewards, each [..., n], float64; zeros for a group of zero features, NaN for one that is not finite.

    Raises:
        ValueError: for n < 2 with a diversity weight, an unknown name, or "dot" with a whitened form.
    """
    return rewards_from_gram(
        gram_matrices(gen, ref),
        alignment_coef=alignment_coef,
        diversity_coef=diversity_coef,
        whitening=whitening,
        alignment=alignment,
    )


@torch.no_grad()
def rewards_from_gram(
    gram: Gram,
    *,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    whitening: str = "paper",
    alignment: str | None = None,
) -> Rewards:
    """As `feature_matching_rewards`; several calls (whitened and not, for the metrics) can share one Gram matrix."""
    n = gram.cross.shape[-1]
    if n < 2 and diversity_coef != 0:
        raise ValueError(
            f"num_generations={n} with diversity_coef={diversity_coef}: the diversity term compares rollouts, "
            "set num_generations >= 2 or diversity_coef: 0."
        )
    if whitening not in WHITENINGS:
        raise ValueError(f"whitening={whitening!r} is unknown: use one of {', '.join(WHITENINGS)}.")
    if alignment not in (None, *ALIGNMENTS):
        raise ValueError(f"alignment={alignment!r} is unknown: use one of {', '.join(ALIGNMENTS)}.")
    if whitening != "none":
        if alignment == "dot":
            raise ValueError(f"alignment='dot' with whitening={whitening!r}: leave alignment out, or whitening: none.")
        similarity, dots = _whitened(gram, whitening)
    else:
        similarity, dots = _cosine(gram) if alignment == "cosine" else gram.cross, gram.rollouts
    aligned = 2 * similarity
    diverse = 2 / max(n - 1, 1) * (dots.sum(-1) - dots.diagonal(dim1=-2, dim2=-1))
    return Rewards(alignment_coef * aligned - diversity_coef * diverse, aligned, diverse)


def feature_matching_loss(gen: Tensor, ref: Tensor, unbiased: bool = True) -> Tensor:
    """Conditional feature-matching loss ||E phi - phi_y||^2 (eq 2) of every context, [...], float64.

    Args:
        gen: features of the rollouts, [..., n, D].
        ref: features of the reference, [..., D].
        unbiased: the U-statistic, whose mean is the loss itself (a single value may be negative); False is the plug-in
            ||mean_j phi_j - phi_y||^2, too large by the rollouts' variance / n: never compare models with it.

    Raises:
        ValueError: if the U-statistic is asked for with n < 2.
    """
    return loss_from_gram(gram_matrices(gen, ref), unbiased)


@torch.no_grad()
def loss_from_gram(gram: Gram, unbiased: bool = True) -> Tensor:
    """As `feature_matching_loss`, from the Gram matrix the rewards are made of."""
    K, g, q = gram
    n = g.shape[-1]
    if not unbiased:
        return K.mean((-2, -1)) - 2 * g.mean(-1) + q
    if n < 2:
        raise ValueError(
            f"num_generations={n}: the unbiased feature-matching loss compares rollouts, set num_generations >= 2."
        )
    pairs = K.sum((-2, -1)) - K.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (n * (n - 1)) - 2 * g.mean(-1) + q


def _whitened(gram: Gram, whitening: str) -> tuple[Tensor, Tensor]:
    """Cosines with the reference [..., n] and dots between the rollouts [..., n, n] after whitening (eq 8-9).

    With X = U S V^T (kept directions only), K = U S^2 U^T and P = K K^+ = U U^T, the projector on the rollouts:
        paper:     phi~ = (X^T X / n)^{+1/2} phi for rollouts and reference, so phi~_j . phi~_j' = n P_jj' and
                   cos_j = (K^+ g)_j / (sqrt(P_jj) ||K^+ g||);
        released:  X~ = K^{+1/2} X, the reference untouched, so phi~_j . phi~_j' = P_jj' and
                   cos_j = (K^{+1/2} g)_j / (sqrt(P_jj) sqrt(q)).
    P_jj = 1 unless rollouts are linearly dependent.
    """
    K, g, q = gram
    finite = torch.isfinite(K).all(-1).all(-1)[..., None, None]
    # LAPACK raises on NaN, and would do so on one rank only: let the group come out as NaN instead.
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, K, 0.0))
    kept = eigenvalues > RELATIVE_TOLERANCE * eigenvalues[..., -1:]
    eigenvalues = torch.where(kept, eigenvalues, 1.0)
    basis = torch.where(kept.unsqueeze(-2), vectors, 0.0)
    projector = torch.where(finite, basis @ basis.mT, torch.nan)
    norm = projector.diagonal(dim1=-2, dim2=-1).sqrt()

    coordinates = (basis.mT @ g.unsqueeze(-1)).squeeze(-1)  # U^T g
    power = eigenvalues ** (-1.0 if whitening == "paper" else -0.5)
    scores = (basis @ (power * coordinates).unsqueeze(-1)).squeeze(-1)  # K^+ g or K^{+1/2} g
    reference_norm = torch.linalg.vector_norm(scores, dim=-1) if whitening == "paper" else q.sqrt()
    # Zero by definition where K^+ g = 0. In floating point: where the reference's part within the span of the
    # rollouts (g^T K^+ g of q), or the rollout's within the kept directions, is below the tolerance.
    within = (coordinates.square() / eigenvalues).sum(-1)
    absent = (norm.square() <= RELATIVE_TOLERANCE) | (within <= RELATIVE_TOLERANCE * q).unsqueeze(-1)
    cosines = torch.where(absent, 0.0, scores / (norm * reference_norm.unsqueeze(-1)))
    return cosines, projector * (g.shape[-1] if whitening == "paper" else 1)


def _cosine(gram: Gram) -> Tensor:
    """Cosines of rollouts and reference without whitening, [..., n]; 0 where either is zero."""
    K, g, q = gram
    norms = (K.diagonal(dim1=-2, dim2=-1) * q.unsqueeze(-1)).sqrt()
    return torch.where(norms == 0, 0.0, g / norms)


def checked_group(gen: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Features gen [..., n, D] and ref [..., D] in float64, on the CPU where their own device has none.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if gen.dim() < 2 or gen.shape[:-2] + gen.shape[-1:] != ref.shape:
        raise ValueError(
            f"ref has shape {tuple(ref.shape)} beside gen {tuple(gen.shape)}: pass gen [..., n, D] and ref [..., D]."
        )
    return as_float64(gen), as_float64(ref)


def as_float64(x: Tensor) -> Tensor:
    """X in float64, on the CPU where its own device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
