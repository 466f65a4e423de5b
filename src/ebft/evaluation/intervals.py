"""Means over documents with bootstrap intervals; documents are what was drawn at random, so they are resampled whole.

Shape letters: M documents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS_AT_A_TIME = 2**23  # drawn for resamples; with the weights made of them 128 MiB


class Estimate(NamedTuple):
    """A mean and the ends of its interval, float64 [...] each."""

    mean: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class DocumentMean:
    """A mean over tokens or contexts, kept as one sum and one count per document.

    Attributes:
        sums: float64 [M, ...].
        counts: float64 [M]: how many tokens or contexts each sum is of.
    """

    sums: Tensor
    counts: Tensor

    def __sub__(self, other: "DocumentMean") -> "DocumentMean":
        """The paired difference of two models on the same documents: what the documents share cancels.

        Raises:
            ValueError: The two are not of the same documents.
        """
        if not torch.equal(self.counts, other.counts):
            raise ValueError("counts differ: only measurements of the same documents can be subtracted.")
        return DocumentMean(self.sums - other.sums, self.counts)

    def estimate(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
        """Mean and percentile bootstrap interval, over `resamples` draws of M documents with replacement.

        Says how much the mean depends on which documents were held out; nothing about another training seed.

        Raises:
            ValueError: No document has anything to average.
        """
        kept = self.counts > 0
        sums, counts = self.sums[kept].double(), self.counts[kept].double()
        if not len(counts):
            raise ValueError("counts are all zero: no document has a token or context to average over.")
        mean = sums.sum(0) / counts.sum()
        generator, flat = torch.Generator().manual_seed(seed), sums.flatten().view(len(counts), -1)
        one, means, at_once = torch.ones((), dtype=torch.float64), [], max(1, NUMBERS_AT_A_TIME // len(counts))
        for first in range(0, resamples, at_once):
            shape = min(at_once, resamples - first), len(counts)
            drawn = torch.randint(len(counts), shape, generator=generator)  # chunk by chunk the same as all at once
            weights = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, one.expand(shape))
            means.append((weights @ flat) / (weights @ counts)[:, None])
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.cat(means).quantile(tails, dim=0)
        # Of equal documents, rounding may put an end on the wrong side of the mean.
        return Estimate(mean, low.view_as(mean).minimum(mean), high.view_as(mean).maximum(mean))
