"""Rewards, feature-matching loss and advantages against reference values and slow oracles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from ebft import advantages
from ebft.rewards import (
    feature_matching_loss,
    feature_matching_rewards,
    gram_matrices,
    loss_from_gram,
    rewards_from_gram,
)

FIXTURES = Path(__file__).parent / "fixtures"
WHITENINGS = ("none", "paper", "released")
CASES = {name: sizes for name, sizes in json.loads((FIXTURES / "meta.json").read_text()).items() if "n" in sizes}


def load(case: str):
    values = {name: torch.from_numpy(array) for name, array in np.load(FIXTURES / f"{case}.npz").items()}
    coefs: dict[str, Any] = {name: CASES[case][name] for name in ("alignment_coef", "diversity_coef")}
    return values, coefs


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_oracle(
    gen: torch.Tensor, ref: torch.Tensor, whitening: str, alignment: str | None = None, tol: float = 1e-9
):
    """Every context of gen [..., n, D], ref [..., D] against the feature-space oracle, both weights tried."""
    result = feature_matching_rewards(
        gen, ref, alignment_coef=0.7, diversity_coef=0.4, whitening=whitening, alignment=alignment
    )
    contexts = zip(gen.double().flatten(0, -3).numpy(), ref.double().flatten(0, -2).numpy(), strict=True)
    expected = [oracles.rewards(X, y, whitening, alignment) for X, y in contexts]
    aligned, diverse = (torch.tensor(np.array(part)).reshape(gen.shape[:-1]) for part in zip(*expected, strict=True))
    torch.testing.assert_close(result.alignment, aligned, rtol=0, atol=tol)
    torch.testing.assert_close(result.diversity, diverse, rtol=0, atol=tol)
    torch.testing.assert_close(result.total, 0.7 * aligned - 0.4 * diverse, rtol=0, atol=tol)


# Reference values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_reference_values(case, whitening):
    values, coefs = load(case)
    # `none` and `released` come from the authors' float32 functions, except where the features are not unit vectors.
    float32 = whitening != "paper" and CASES[case].get("unit_features", True)
    tol = {"rtol": 0, "atol": 1e-5 if float32 else 1e-10}
    result = feature_matching_rewards(values["features"], values["reference"], whitening=whitening, **coefs)
    torch.testing.assert_close(result.alignment, values[f"{whitening}_alignment"], **tol)
    torch.testing.assert_close(result.diversity, values[f"{whitening}_diversity"], **tol)
    torch.testing.assert_close(result.total, values[f"{whitening}_reward"], **tol)
    torch.testing.assert_close(advantages.leave_one_out(result, **coefs), values[f"{whitening}_advantage"], **tol)


@pytest.mark.parametrize("case", CASES)
def test_reference_losses(case):
    values, _ = load(case)
    for unbiased, name in ((True, "fm_unbiased"), (False, "fm_plugin")):
        loss = feature_matching_loss(values["features"], values["reference"], unbiased=unbiased)
        torch.testing.assert_close(loss, values[name], rtol=0, atol=1e-12)


# Slow oracles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_feature_space_oracle(whitening, n):
    check_oracle(sample(2, 3, n, 12), sample(2, 3, 12, seed=1), whitening)


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize(
    "degenerate", ["duplicates", "all_equal", "dependent", "n_above_D", "zero_rollout", "ref_in_group"]
)
def test_degenerate_groups(whitening, degenerate):
    gen, ref = sample(5, 4, 9), sample(5, 9, seed=1)
    if degenerate == "duplicates":
        gen[:, 2] = gen[:, 0]
    elif degenerate == "all_equal":
        gen[:] = gen[:, :1].clone()
    elif degenerate == "dependent":
        gen[:, 3] = 0.5 * gen[:, 0] - 2 * gen[:, 1]
    elif degenerate == "n_above_D":
        gen, ref = gen[..., :3], ref[..., :3]
    elif degenerate == "zero_rollout":
        gen[:, 1] = 0
    else:
        ref = gen[:, 0].clone()
    check_oracle(gen, ref, whitening)


def test_cosine_without_whitening():
    gen, ref = sample(2, 3, 4, 6), sample(2, 3, 6, seed=1)
    gen[0, 0, 1], ref[1, 2] = 0, 0
    check_oracle(gen, ref, "none", "cosine")
    whitened = feature_matching_rewards(gen, ref, alignment="cosine")
    assert all(torch.equal(a, b) for a, b in zip(whitened, feature_matching_rewards(gen, ref), strict=True))


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_features(whitening, dtype):
    """Products of the rounded features are exact in float64, so duplicates are found whatever the input's dtype."""
    gen, ref = sample(200, 4, 64, dtype=dtype), sample(200, 64, seed=1, dtype=dtype)
    gen[::2, 3] = gen[::2, 1]
    check_oracle(gen, ref, whitening)
    assert feature_matching_rewards(gen, ref, whitening=whitening).total.dtype == torch.float64


@pytest.mark.parametrize(("scale", "counts"), [(2e-5, True), (5e-6, False)])
def test_tolerance_is_on_singular_values(scale, counts):
    """Orthogonal rollouts, one of them `scale` long: a direction of its own above 1e-5, absent below."""
    gen, ref = torch.diag(torch.tensor([1.0, 1.0, scale], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    alignment = feature_matching_rewards(gen, ref, whitening="released").alignment
    expected = torch.tensor([2.0, 2.0, 2.0 * counts], dtype=torch.float64) / 3**0.5
    torch.testing.assert_close(alignment, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("whitening", ["paper", "released"])
def test_reference_outside_the_span_gives_zero_alignment(whitening):
    """K^+ g = 0: exactly orthogonal, orthogonal up to rounding, or a zero reference."""
    gen = torch.cat([sample(2, 4, 10), torch.zeros(2, 4, 10, dtype=torch.float64)], -1)
    ref = torch.cat([torch.zeros(2, 10, dtype=torch.float64), sample(2, 10, seed=1)], -1)
    rotation = torch.linalg.qr(sample(20, 20, seed=2)).Q
    for features, reference in ((gen, ref), (gen @ rotation, ref @ rotation), (gen, 0 * ref)):
        alignment = feature_matching_rewards(features, reference, whitening=whitening).alignment
        assert torch.equal(alignment, torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_zero_and_non_finite_groups(whitening):
    """A block that does not exist (zero features) gets zeros; NaN stays NaN, in its own group only."""
    gen, ref = sample(1, 4, 3, 6), sample(1, 4, 6, seed=1)
    gen[0, 0], ref[0, 0] = 0, 0
    gen[0, 1, 2, 3] = torch.nan
    ref[0, 2, 0] = torch.nan
    result = feature_matching_rewards(gen, ref, whitening=whitening)
    assert torch.equal(result.total[0, 0], torch.zeros(3, dtype=torch.float64))
    assert result.total.isnan().all(-1).tolist() == [[False, True, True, False]]
    assert result.total[0, 3].isfinite().all()


def test_any_leading_shape_and_shared_gram():
    """[B, K, n, D], [B, K, G, n, D] and [n, D] are the same computation; one Gram matrix serves several calls."""
    gen, ref = sample(2, 3, 5, 4, 8), sample(2, 3, 5, 8, seed=1)
    full = feature_matching_rewards(gen, ref)
    assert full.total.shape == (2, 3, 5, 4)
    one = feature_matching_rewards(gen[1, 2, 3], ref[1, 2, 3])
    torch.testing.assert_close(full.total[1, 2, 3], one.total, rtol=0, atol=1e-12)
    gram = gram_matrices(gen, ref)
    assert torch.equal(rewards_from_gram(gram).total, full.total)
    assert torch.equal(loss_from_gram(gram), feature_matching_loss(gen, ref))


def test_rewards_carry_no_gradient():
    gen = sample(3, 8).requires_grad_()
    assert not feature_matching_rewards(gen, sample(8, seed=1)).total.requires_grad


# The loss --------------------------------------------------------------------------------------------------------


def test_loss_oracles():
    gen, ref = sample(2, 3, 4, 7), sample(2, 3, 7, seed=1)
    contexts = list(zip(gen.flatten(0, 1).numpy(), ref.flatten(0, 1).numpy(), strict=True))
    unbiased = torch.tensor(np.array([oracles.u_statistic(X, y) for X, y in contexts])).reshape(2, 3)
    torch.testing.assert_close(feature_matching_loss(gen, ref), unbiased, rtol=0, atol=1e-12)
    plugin = (gen.mean(-2) - ref).square().sum(-1)
    torch.testing.assert_close(feature_matching_loss(gen, ref, unbiased=False), plugin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_loss_is_unbiased_by_enumeration(n):
    """Mean over all groups: ||E phi - phi_y||^2 for the U-statistic, plus variance / n for the plug-in."""
    phi, ref, probs = sample(6, 5), sample(5, seed=1), sample(6, seed=2).softmax(-1)
    groups = oracles.groups(6, n)
    weights = probs[groups].prod(-1)
    exact = oracles.quadratic_loss(probs, phi, ref)
    variance = probs @ phi.square().sum(-1) - (probs @ phi).square().sum()
    refs = ref.expand(len(groups), -1)
    torch.testing.assert_close(weights @ feature_matching_loss(phi[groups], refs), exact, rtol=1e-12, atol=0)
    plugin = weights @ feature_matching_loss(phi[groups], refs, unbiased=False)
    torch.testing.assert_close(plugin, exact + variance / n, rtol=1e-12, atol=0)


# Advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_leave_one_out_recomputes_rewards_without_the_sample(n):
    gen, ref = sample(6, n, 7), sample(6, 7, seed=1)
    coefs: dict[str, Any] = {"alignment_coef": 0.7, "diversity_coef": 0.4}
    result = feature_matching_rewards(gen, ref, whitening="none", **coefs)
    expected = [oracles.leave_one_out_advantage(X.numpy(), y.numpy(), **coefs) for X, y in zip(gen, ref, strict=True)]
    actual = advantages.leave_one_out(result, **coefs)
    torch.testing.assert_close(actual, torch.tensor(np.array(expected)), rtol=0, atol=1e-12)


def test_leave_one_out_baseline_ignores_its_own_sample():
    """Changing sample 0 changes its advantage by exactly its reward's change; rloo's baseline moves with it."""
    gen, ref = sample(4, 6), sample(6, seed=1)
    changed = torch.cat([sample(1, 6, seed=2), gen[1:]])
    before, after = (feature_matching_rewards(x, ref, whitening="none") for x in (gen, changed))
    shift = (after.total - before.total)[0]
    exact = (advantages.leave_one_out(after) - advantages.leave_one_out(before))[0]
    torch.testing.assert_close(exact, shift, rtol=1e-12, atol=0)
    assert ((advantages.rloo(after.total) - advantages.rloo(before.total))[0] - shift).abs() > 1e-2


def test_simple_estimators():
    total = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(advantages.rloo(total), torch.tensor([[-3.0, -1.5, 4.5]], dtype=torch.float64))
    std = 7**0.5  # unbiased, over the group
    expected = torch.tensor([[-2.0, -1.0, 3.0]], dtype=torch.float64) / (std + 1e-4)
    torch.testing.assert_close(advantages.group_norm(total), expected)
    assert torch.equal(advantages.group_norm(torch.ones(2, 3)), torch.zeros(2, 3))
    assert torch.equal(advantages.none(total), total)
    rewards = (total, total, 0 * total)
    for name, function in advantages.ON_TOTAL.items():
        assert torch.equal(advantages.estimate(name, rewards), function(total))
    assert torch.equal(advantages.estimate("leave_one_out", rewards), advantages.leave_one_out(rewards))


def test_reward_to_go():
    rewards = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]).expand(2, 5, 3, 2)
    expected = torch.tensor([[7.0, 70.0], [6.0, 60.0], [4.0, 40.0]]).expand(2, 5, 3, 2)
    assert torch.equal(advantages.reward_to_go(rewards), expected)


# Small groups and bad input ---------------------------------------------------------------------------------------


def test_one_rollout():
    gen, ref = sample(3, 1, 6), sample(3, 6, seed=1)
    result = feature_matching_rewards(gen, ref, diversity_coef=0.0, whitening="none")
    torch.testing.assert_close(result.total.squeeze(-1), 2 * (gen[:, 0] * ref).sum(-1))
    assert not result.diversity.any()
    with pytest.raises(ValueError, match=r"num_generations=1 with diversity_coef=1\.0.*>= 2"):
        feature_matching_rewards(gen, ref)
    with pytest.raises(ValueError, match="num_generations=1"):
        feature_matching_loss(gen, ref)
    assert torch.equal(advantages.none(result.total), result.total)
    for name in ("leave_one_out", "rloo", "group_norm"):
        with pytest.raises(ValueError, match=f"num_generations=1 with advantage_estimator='{name}'"):
            advantages.estimate(name, result, diversity_coef=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whitening": "zca"}, "whitening='zca'.*none, paper, released"),
        ({"whitening": "paper", "alignment": "dot"}, "alignment='dot' with whitening='paper'"),
        ({"whitening": "none", "alignment": "l2"}, "alignment='l2'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        feature_matching_rewards(sample(3, 4), sample(4), **options)


def test_bad_shapes_and_estimator():
    with pytest.raises(ValueError, match=r"ref has shape \(3, 4\) beside gen \(2, 3, 4\)"):
        feature_matching_rewards(sample(2, 3, 4), sample(3, 4))
    with pytest.raises(ValueError, match=r"advantage_estimator='grpo'.*leave_one_out, rloo, group_norm, none"):
        advantages.estimate("grpo", feature_matching_rewards(sample(3, 4), sample(4)))


# Properties -------------------------------------------------------------------------------------------------------

sizes = {"n": st.integers(2, 8), "seed": st.integers(0, 10**6), "whitening": st.sampled_from(WHITENINGS)}


@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_permutation_equivariance(n, seed, whitening):
    gen, ref = sample(n, 16, seed=seed), sample(16, seed=seed + 1)
    gen[n // 2] = gen[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    straight = feature_matching_rewards(gen, ref, whitening=whitening)
    permuted = feature_matching_rewards(gen[order], ref, whitening=whitening)
    for a, b in zip(straight, permuted, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        advantages.leave_one_out(straight)[order], advantages.leave_one_out(permuted), rtol=0, atol=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(**sizes, m=st.integers(1, 8), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_whitened_diversity_counts_duplicates_only(n, seed, whitening, m, dtype):
    """M identical rollouts get 2 (m - 1) / (m (n - 1)) each in the released form, n times that in the paper's."""
    m = min(m, n)
    gen = sample(n, 32, seed=seed).to(dtype)
    gen[:m] = gen[0].clone()
    whitening = "paper" if whitening == "none" else whitening
    diversity = feature_matching_rewards(gen, sample(32, seed=seed + 1), whitening=whitening).diversity
    expected = torch.zeros(n, dtype=torch.float64)
    expected[:m] = 2 * (m - 1) / (m * (n - 1)) * (n if whitening == "paper" else 1)
    torch.testing.assert_close(diversity, expected, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_paper_alignments_of_independent_rollouts_sum_to_one(n, seed):
    """The squared cosines do, so the whitened reward is no measure of progress."""
    alignment = feature_matching_rewards(sample(n, 16, seed=seed), sample(16, seed=seed + 1)).alignment
    torch.testing.assert_close((alignment / 2).square().sum(), torch.tensor(1.0, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(**sizes, scale=st.floats(1e-3, 1e3))
def test_whitening_is_blind_to_scale_and_rotation(n, seed, whitening, scale):
    gen, ref = sample(n, 12, seed=seed), sample(12, seed=seed + 1)
    rotation = torch.linalg.qr(sample(12, 12, seed=seed + 2)).Q
    factor = 1.0 if whitening == "none" else scale
    plain = feature_matching_rewards(gen, ref, whitening=whitening)
    moved = feature_matching_rewards(factor * gen @ rotation, factor * ref @ rotation, whitening=whitening)
    torch.testing.assert_close(plain.total, moved.total, rtol=0, atol=1e-7)
