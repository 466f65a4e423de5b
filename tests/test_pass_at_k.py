"""pass@k against all subsets of the samples, one by one."""

import itertools
import math

import numpy as np
import pytest

from ebft.evaluation.pass_at_k import check_k, pass_at_k


def share_of_passing_subsets(n, c, k):
    """How many of all k-subsets of n samples, the first c of which pass, hold one that passes."""
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    return sum(map(any, subsets)) / len(subsets)


@pytest.mark.parametrize("n", range(1, 8))
def test_every_subset(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        assert pass_at_k(n, c, k) == pytest.approx(share_of_passing_subsets(n, c, k), abs=1e-15)


@pytest.mark.parametrize(("k", "p"), [(1, 0.3), (4, 0.3), (8, 0.05)])
def test_unbiased(k, p):
    """Its mean over all outcomes of n samples is the chance that one of k passes; that of 1 - (1 - c/n)^k is not."""
    n = 8
    counts = np.arange(n + 1)
    chances = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in counts])
    assert chances @ pass_at_k(n, counts, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)
    if k > 1:
        assert chances @ (1 - (1 - counts / n) ** k) < 1 - (1 - p) ** k - 0.001


def test_problems_at_once_are_problems_one_by_one():
    n, c = np.array([5, 9, 9, 16]), np.array([0, 9, 2, 13])
    together = pass_at_k(n, c, 4)
    assert together.shape == (4,) and together.dtype == np.float64
    assert together.tolist() == [float(pass_at_k(int(a), int(b), 4)) for a, b in zip(n, c, strict=True)]
    assert pass_at_k(5, [0, 5], 1).tolist() == [0.0, 1.0]
    assert pass_at_k([], [], 1).shape == (0,)


def test_large_numbers_and_small_values():
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12, abs=0)
    assert pass_at_k(10**6, 1, 1000) == pytest.approx(1e-3, rel=1e-12, abs=0)
    assert pass_at_k(20_000, 10_000, 10_001) == 1.0
    exact = 1 - math.comb(2000 - 20, 100) / math.comb(2000, 100)
    assert pass_at_k(2000, 20, 100) == pytest.approx(exact, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 2, 5, r"k=5 is larger than the number of samples of a problem \(4\): draw at least 5"),
        ([8, 4], [1, 1], 5, r"k=5 is larger .* \(4\)"),
        (4, 2, 0, "k=0: pass@k needs a k of at least 1"),
        ([4, 4], [2, 5], 1, "c=5 of problem 1: give a number from 0 to its n=4"),
        (4, -1, 1, "c=-1 of problem 0"),
        (4, 0.5, 1, "c=0.5: give whole numbers"),
    ],
)
def test_impossible_numbers(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_ks_are_checked_before_anything_is_drawn():
    check_k([1, 4, 16], 16)
    with pytest.raises(ValueError, match=r"^pass_at_k=16 is larger than the number of samples of a problem \(8\)"):
        check_k([1, 16], 8)
    with pytest.raises(ValueError, match="^ks is empty"):
        check_k([], 8, "ks")
