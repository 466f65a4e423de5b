"""Kernels against loops in plain Python, and what must hold of each whatever its numbers."""

import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from ebft import advantages
from ebft.kernels import Kernel, kernel_gram, median_distance, ngram_gram
from ebft.noise import random_frequencies
from ebft.rewards import gram_matrices, loss_from_gram, rewards_from_gram

D = 6
KERNELS = {
    "linear": Kernel("linear"),
    "rbf": Kernel("rbf", bandwidths=(1.5,)),
    "sum of scales": Kernel("rbf", bandwidths=(0.3, 1.0, 4.0)),
    "energy": Kernel("energy"),
    "characteristic": Kernel("characteristic", frequencies=random_frequencies(D, 16, (1.5,), seed=3)),
}
OF_DIFFERENCES = [name for name in KERNELS if name != "linear"]


def sample(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loops(kernel: Kernel):
    options = dict(bandwidths=kernel.bandwidths, frequencies=kernel.frequencies, sizes=kernel.sizes)
    return partial(oracles.kernel_value, name=kernel.name, **options)


def check_group(gram, X, y, k) -> None:
    """Kernel values, rewards, advantages and loss of one group [n, ...] are those of the loops."""
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    close(gram.rollouts, oracles.kernel_matrix(X, k))
    close(gram.cross, [k(x, y) for x in X])
    close(gram.reference, k(y, y))
    assert {value.dtype for value in gram} == {torch.float64}
    coefs = dict(alignment_coef=0.7, diversity_coef=0.4)
    rewards = rewards_from_gram(gram, whitening="none", **coefs)
    aligned, diverse = oracles.kernel_rewards(X, y, k)
    close(rewards.alignment, aligned)
    close(rewards.diversity, diverse)
    close(rewards.total, 0.7 * aligned - 0.4 * diverse)
    close(loss_from_gram(gram), oracles.mmd_u_statistic(X, y, k))
    baselines = []
    for j in range(len(X)):  # the mean reward of the others, as if j had never been drawn
        a, d = oracles.kernel_rewards([x for i, x in enumerate(X) if i != j], y, k)
        baselines.append(np.mean(0.7 * a - 0.4 * d))
    close(advantages.leave_one_out(rewards, **coefs), rewards.total.numpy() - baselines)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_features_one_pair_at_a_time(name, dtype):
    gen, ref = sample(2, 3, 4, D, dtype=dtype), sample(2, 3, D, seed=1, dtype=dtype)
    gen[:, :, 2] = gen[:, :, 0]
    found = kernel_gram(gen, ref, KERNELS[name])
    for b in range(2):
        for k in range(3):
            group = type(found)(*(value[b, k] for value in found))
            check_group(group, gen[b, k].double(), ref[b, k].double(), loops(KERNELS[name]))


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (1, 2, 5), (5,)])
def test_ngrams_one_pair_at_a_time(sizes):
    tokens = torch.randint(0, 3, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    reference = torch.randint(0, 3, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    tokens[0, 0], reference[0, 0] = 1, 1  # every window equal
    found = ngram_gram(tokens, reference, sizes)
    for b in range(2):
        for k in range(3):
            group = type(found)(*(value[b, k] for value in found))
            check_group(group, tokens[b, k], reference[b, k], loops(Kernel("ngram", sizes=sizes)))


def test_ngrams_of_the_whole_completion_are_equality():
    tokens = torch.randint(0, 2, (6, 3), generator=torch.Generator().manual_seed(0))
    same = (tokens[:, None] == tokens).all(-1).double()
    assert 6 < same.sum() < 36
    assert torch.equal(ngram_gram(tokens, tokens[0], (3,)).rollouts, same)


def test_a_block_that_is_not_there_is_like_nothing():
    """The layout's references are -100 there."""
    gram = ngram_gram(torch.zeros(2, 3, dtype=torch.long), torch.full((3,), -100), (1, 2))
    assert not gram.cross.any() and all(value.isfinite().all() for value in gram)


def test_linear_is_the_inner_product():
    gen, ref = sample(5, 4, D), sample(5, D, seed=1)
    for one, other in zip(kernel_gram(gen, ref, KERNELS["linear"]), gram_matrices(gen, ref), strict=True):
        assert torch.equal(one, other)


# --- what the literature says of each ---


def test_energy_distance_by_brute_force():
    """2 E|X - y| - E|X - X'|, X' an independent draw; of one feature, the square of scipy's energy distance."""
    from scipy.stats import energy_distance

    gen, ref = sample(7, D), sample(D, seed=1)
    pairs = [float((a - b).norm()) for a, b in permutations(gen, 2)]
    expected = 2 * np.mean([float((x - ref).norm()) for x in gen]) - np.mean(pairs)
    gram = kernel_gram(gen, ref, KERNELS["energy"])
    assert loss_from_gram(gram).item() == pytest.approx(expected, rel=1e-12)
    one, other = gen[:, :1], ref[:1]
    plug_in = loss_from_gram(kernel_gram(one, other, KERNELS["energy"]), unbiased=False)
    assert plug_in.item() == pytest.approx(energy_distance(one[:, 0], other) ** 2, rel=1e-12)


def test_more_frequencies_come_nearer_to_the_gaussian():
    """Random Fourier features estimate the rbf kernel, their scales the mean over scales: within 4 standard errors."""
    gen, ref, scales = sample(3, 4, D), sample(3, D, seed=1), (0.7, 2.0)
    exact = kernel_gram(gen, ref, Kernel("rbf", bandwidths=scales))
    for count in (1000, 64_000):
        frequencies = random_frequencies(D, count, scales, seed=0)
        found = kernel_gram(gen, ref, Kernel("characteristic", frequencies=frequencies))
        for one, other in zip(found, exact, strict=True):
            assert (one - other).abs().max() < 4 / math.sqrt(count)


def test_frequencies_are_of_the_seed_and_of_their_scales():
    scales = (0.5, 4.0)
    w = random_frequencies(40, 300, scales, seed=5)
    assert w.shape == (40, 300) and w.dtype == torch.float64
    for i, s in enumerate(scales):
        assert w[:, i::2].std().item() == pytest.approx(1 / s, rel=0.05)
    assert torch.equal(w, random_frequencies(40, 300, scales, seed=5))
    assert torch.equal(w[:, :100], random_frequencies(40, 100, scales, seed=5)), "more leave the first as they are"
    assert not torch.equal(w, random_frequencies(40, 300, scales, seed=6))
    expected = np.random.Generator(np.random.PCG64([5, 5])).standard_normal(40) / 0.5
    np.testing.assert_array_equal(w[:, 0], expected)


@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_equal_features(name):
    """Exactly 1 (0 of a distance), which a matrix product of large float32 features would miss."""
    one = 100 * sample(D, dtype=torch.float32)
    gram = kernel_gram(one.expand(3, D), one, KERNELS[name])
    expected = 0.0 if name == "energy" else 1.0
    for value in gram:
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=0, atol=1e-12)
    if name != "characteristic":
        assert all((value == expected).all() for value in gram)
    assert loss_from_gram(gram).item() == pytest.approx(0, abs=1e-12)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), name=st.sampled_from(OF_DIFFERENCES))
@settings(deadline=None)
def test_invariances(seed, n, name):
    """A shift changes nothing, a rotation nothing where there are distances alone, order only the order."""
    gen, ref, kernel = sample(n, D, seed=seed), sample(D, seed=seed + 1), KERNELS[name]
    plain, shift = kernel_gram(gen, ref, kernel), sample(D, seed=seed + 2)
    moved = [kernel_gram(gen + shift, ref + shift, kernel)]
    if name != "characteristic":
        rotation = torch.linalg.qr(sample(D, D, seed=seed + 3))[0]
        moved.append(kernel_gram(gen @ rotation, ref @ rotation, kernel))
    for other in moved:
        for one, two in zip(plain, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(kernel_gram(gen[order], ref, kernel).cross, plain.cross[order])
    eigenvalues = torch.linalg.eigvalsh(plain.rollouts)  # ascending
    assert (eigenvalues[name == "energy" :] > -1e-9).all(), "definite; energy only among weights that sum to 0"


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), name=st.sampled_from([*KERNELS, "ngram"]))
@settings(deadline=None)
def test_plug_in_loss_is_a_squared_distance(seed, n, name):
    if name == "ngram":
        tokens = torch.randint(0, 3, (n + 1, 4), generator=torch.Generator().manual_seed(seed))
        gram = ngram_gram(tokens[:-1], tokens[-1], (1, 2))
    else:
        gram = kernel_gram(sample(n, D, seed=seed), sample(D, seed=seed + 1), KERNELS[name])
    assert loss_from_gram(gram, unbiased=False).item() > -1e-12


# --- what is not finite, and what does not belong together ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["rollout", "reference"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_group_that_is_not_finite_is_nan_and_no_other(name, where, bad):
    gen, ref = sample(3, 4, D), sample(3, D, seed=1)
    (gen[1, 2] if where == "rollout" else ref[1])[0] = bad
    gram = kernel_gram(gen, ref, KERNELS[name])
    rewards = rewards_from_gram(gram, whitening="none")
    kept = (rewards.total, advantages.leave_one_out(rewards), loss_from_gram(gram)[:, None])
    if bad == math.nan or name != "linear":
        assert all(value[1].isnan().all() for value in kept)
    assert all(value[[0, 2]].isfinite().all() for value in kept)


@pytest.mark.parametrize("name", KERNELS)
def test_shapes_are_refused(name):
    with pytest.raises(ValueError, match=r"ref has shape \(3, 2\) beside gen \(3, 4, 6\)"):
        kernel_gram(sample(3, 4, D), sample(3, 2), KERNELS[name])
    with pytest.raises(ValueError, match=r"reference has shape \(3, 2\) beside tokens \(3, 4, 6\)"):
        ngram_gram(torch.zeros(3, 4, D), torch.zeros(3, 2), (1,))


def test_ngrams_of_completions_that_end():
    """Each to its own end: negative ids stand where there is no token, and match nothing, not even each other."""
    rows = [[5, 6, 5, 6, 5], [5, 6], [6], [5, 6, 7, 5], []]
    sizes, longest = (1, 2, 3), 6
    ids = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in rows])
    gram = ngram_gram(ids[:-1], ids[-2], sizes)
    kernel = partial(oracles.kernel_value, name="ngram", sizes=sizes)
    values = [[kernel(np.array(x), np.array(y)) for y in rows[:-1]] for x in rows[:-1]]
    expected = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(gram.rollouts, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gram.cross, expected[:, -1], rtol=1e-12, atol=0)
    assert gram.reference == gram.rollouts[-1, -1]
    assert not ngram_gram(ids[:-1], ids[-1], sizes).cross.any()


@pytest.mark.parametrize("sizes", [(), (0,), (1, -1)])
def test_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="give sizes of at least 1 token"):
        ngram_gram(torch.zeros(2, 3), torch.zeros(3), sizes)


# --- the median of distances ---


def test_median_distance():
    features = sample(2, 5, D)
    every = sorted(
        math.dist(x.tolist(), y.tolist()) for group in features for i, x in enumerate(group) for y in group[:i]
    )
    assert len(every) == 20
    assert median_distance(features).item() == pytest.approx(every[9], rel=1e-12)  # the lower of the middle two
    assert median_distance(features[:1, :3].float()).dtype == torch.float64
