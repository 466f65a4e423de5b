"""Kernels: which statistic of the rollouts is matched to the reference's. Pure tensors.

Put k(x, y) in the place of the inner product x . y, and `rewards` and `advantages` stay as they are: the reward is
    r_j = 2 k(x_j, y) - 2 / (n - 1) sum_{j' != j} k(x_j, x_j'),
the loss the squared maximum mean discrepancy (MMD, Gretton et al. 2012) between the rollouts' distribution P and the
point mass at the reference, E k(X, X') - 2 E k(X, y) + k(y, y) with X, X' independent draws from P.

    linear          x . y: only the mean features are matched, as in the paper
    rbf             the mean over bandwidths s of exp(-|x - y|^2 / (2 s^2))
    energy          -|x - y|: the loss is the energy distance 2 E|X - y| - E|X - X'| (Szekely & Rizzo 2013)
    characteristic  the mean over M frequencies w of cos(w . (x - y)): random Fourier features (Rahimi & Recht 2007)
    ngram           of token ids: pairs of equal windows over the number of windows, the mean over window sizes

Shapes: n rollouts of one context, D features, G tokens; any leading dimensions. All is float64, as in `rewards`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rewards import Gram, as_float64, checked_group, gram_matrices

KERNELS = ("linear", "rbf", "energy", "characteristic", "ngram")
NO_TOKEN = -100  # behind the end of a completion, as in labels


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel with its parameters, fixed before any rollout is seen.

    Attributes:
        name: Of `KERNELS`.
        bandwidths: Of rbf: the scales s, in units of the features.
        frequencies: Of characteristic: float64 [D, M].
        sizes: Of ngram: tokens of a window.
    """

    name: str
    bandwidths: tuple[float, ...] = ()
    frequencies: Tensor | None = None
    sizes: tuple[int, ...] = ()


@torch.no_grad()
def kernel_gram(generated: Tensor, reference: Tensor, kernel: Kernel) -> Gram:
    """Kernel values within each group, of features.

    Args:
        generated: Features of the rollouts, [..., n, D].
        reference: Features of the reference, [..., D].
        kernel: Any but ngram.

    Returns:
        A `Gram` of kernel values, float64; NaN for a group that is not finite.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if kernel.name == "linear":
        return gram_matrices(generated, reference)
    generated, reference = checked_group(generated, reference)
    if kernel.name == "characteristic":
        assert kernel.frequencies is not None, "characteristic comes with its frequencies"
        return gram_matrices(*(fourier_features(x, kernel.frequencies) for x in (generated, reference)))
    group = torch.cat([generated, reference.unsqueeze(-2)], dim=-2)
    distances = _distances(group)
    values = -distances if kernel.name == "energy" else _rbf(distances, kernel.bandwidths)
    # A feature that is infinite would be one that is far away.
    finite = torch.isfinite(group).all(-1).all(-1)[..., None, None]
    return _gram_of(values.where(finite, torch.nan))


@torch.no_grad()
def ngram_gram(tokens: Tensor, reference: Tensor, sizes: Sequence[int]) -> Gram:
    """Inner products of counts of n-grams within each group, no network needed.

    Per size m, two completions of G tokens have (G - m + 1)^2 pairs of windows; the equal ones are counted, which is
    the inner product of their counts of m-grams, over G - m + 1, so that k(x, x) is 1 where no m-gram comes twice.
    Of completions that end sooner, over the geometric mean of their numbers of windows.

    Args:
        tokens: LongTensor [..., n, G], the rollouts; negative where there is no token.
        reference: LongTensor [..., G], likewise.
        sizes: Each m, at least 1; a completion of fewer tokens than m has no such window.

    Returns:
        A `Gram` of the means over sizes, float64.

    Raises:
        ValueError: if a size is out of range or the shapes do not belong together.
    """
    if tokens.dim() < 2 or tokens.shape[:-2] + tokens.shape[-1:] != reference.shape:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} beside tokens {tuple(tokens.shape)}: pass tokens "
            "[..., n, G] and reference [..., G]."
        )
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}: give sizes of at least 1 token.")
    group = torch.cat([tokens, reference.unsqueeze(-2)], dim=-2)
    there = group >= 0
    lengths = there.sum(-1)
    same = group[..., :, None, :, None] == group[..., None, :, None, :]  # [..., n+1, n+1, G, G]: token i is token j
    same = same & there[..., :, None, :, None]
    windows, values = same, []
    for m in range(1, max(sizes) + 1):
        if m > 1:  # windows of m tokens are equal where those of m - 1 are, and the next token too
            windows = windows[..., :-1, :-1] & same[..., m - 1 :, m - 1 :]
        if m in sizes:
            count = (lengths - m + 1).clamp(min=1).double()
            values.append(windows.sum((-2, -1)) / (count[..., :, None] * count[..., None, :]).sqrt())
    return _gram_of(torch.stack(values).mean(0))


def fourier_features(x: Tensor, frequencies: Tensor) -> Tensor:
    """[cos(w . x), sin(w . x)] / sqrt(M) of float64 x [..., D] and frequencies w [D, M]: [..., 2 M].

    Their inner product is the mean over w of cos(w . (x - y)).
    """
    angles = x @ frequencies.to(x.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) / frequencies.shape[-1] ** 0.5


@torch.no_grad()
def median_distance(features: Tensor) -> Tensor:
    """Median of the pairwise distances of features [..., M, D], over all leading dimensions: a float64 scalar."""
    distances = _distances(as_float64(features))
    first, second = torch.triu_indices(*distances.shape[-2:], offset=1, device=distances.device)
    return distances[..., first, second].median()


def _distances(x: Tensor) -> Tensor:
    """Pairwise distances of x [..., n, D]; exactly 0 of equal ones, which a matrix product would not give."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _rbf(distances: Tensor, bandwidths: Sequence[float]) -> Tensor:
    return torch.stack([(-0.5 * (distances / s).square()).exp() for s in bandwidths]).mean(0)


def _gram_of(values: Tensor) -> Gram:
    """From the kernel values [..., n + 1, n + 1] of the rollouts and, last, the reference."""
    return Gram(values[..., :-1, :-1], values[..., :-1, -1], values[..., -1, -1])
