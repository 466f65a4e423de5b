"""Policy, cross-entropy and KL losses: denominators of the whole step, masking without NaN, schedules."""

import math

import pytest
import torch

from ebft import losses


def sample(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_policy_loss_by_loops():
    B, K, N, G = 2, 3, 4, 5
    log_probs, advantages = sample(B, K, N, G), sample(B, K, N, seed=1)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    expected = 0.0
    for b, k, j, t in [(b, k, j, t) for b in range(B) for k in range(K) for j in range(N) for t in range(G)]:
        expected -= float(valid[b, k] * advantages[b, k, j] * log_probs[b, k, j, t]) / (G * N * 3)
    loss, metrics = losses.policy_loss(log_probs, advantages, valid, G * N * 3)
    assert loss.item() == pytest.approx(expected, rel=1e-12) == metrics["policy_loss"].item()
    per_token, _ = losses.policy_loss(log_probs, advantages.unsqueeze(-1).expand(-1, -1, -1, G), valid, G * N * 3)
    assert per_token.item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_equals_torch():
    logits, labels = sample(2, 6, 7), torch.tensor([[1, 2, 3, -100, 4, -100], [-100, 0, 6, 5, -100, -100]])
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss, metrics = losses.cross_entropy(log_probs, labels != -100, 7)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert metrics["ce_loss"].item() == loss.item()


@pytest.mark.parametrize("mode", ["token", "document"])
def test_sum_over_micro_batches_is_the_step(mode):
    """Losses and gradients do not see how rows are cut into micro-batches, nor padding columns."""
    log_probs = sample(4, 9).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 3, 0, 5]).unsqueeze(-1)
    weights = losses.loss_weights(mask, mode)
    denominator = weights.sum().item()
    assert denominator == pytest.approx(17 if mode == "token" else 3)
    whole, _ = losses.cross_entropy(log_probs, weights, denominator)
    parts = torch.zeros((), dtype=torch.float64)
    for part in ((slice(0, 1), slice(0, 9)), (slice(1, 4), slice(0, 6))):
        parts = parts + losses.cross_entropy(log_probs[part], losses.loss_weights(mask[part], mode), denominator)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, log_probs)[0] for loss in (whole, parts)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_document_weights_are_the_mean_per_row_then_over_rows():
    log_probs = sample(3, 6)
    mask = torch.arange(6) < torch.tensor([6, 2, 0]).unsqueeze(-1)
    weights = losses.loss_weights(mask, "document")
    loss, _ = losses.cross_entropy(log_probs, weights, weights.sum().item())
    torch.testing.assert_close(loss, -(log_probs[0].mean() + log_probs[1, :2].mean()) / 2, rtol=1e-12, atol=0)


def test_document_weights_do_not_see_packing():
    """Two documents in one row, or in a row each: the same weights; equal lengths: the same loss as per token."""
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 0, 0]], dtype=torch.bool)
    documents = torch.tensor([[0, 0, 0, 0, 2, 2, -1, -1]])
    packed = losses.loss_weights(mask, "document", documents)
    apart = losses.loss_weights(torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool), "document")
    torch.testing.assert_close(packed[0, :6], torch.cat([apart[0], apart[1, :2]]), rtol=1e-12, atol=0)
    assert packed.sum().item() == pytest.approx(2)
    assert not packed[0, 6:].any()

    even = torch.ones(2, 3, dtype=torch.bool)
    for mode in ("token", "document"):
        weights = losses.loss_weights(even, mode)
        loss, _ = losses.cross_entropy(sample(2, 3), weights, weights.sum().item())
        torch.testing.assert_close(loss, -sample(2, 3).mean(), rtol=1e-12, atol=0)
    assert losses.loss_weights(mask[:, :0], "document", documents[:, :0]).shape == (1, 0)


def test_nothing_leaks_from_invalid_places():
    """NaN and inf under the mask, in every argument: values and gradients equal those without the invalid entries."""
    valid = torch.tensor([[True, False]])
    clean, ref, advantages = sample(1, 2, 3, 4), sample(1, 2, 3, 4, seed=1), sample(1, 2, 3, seed=2)
    dirty, dirty_ref, dirty_advantages = clean.clone(), ref.clone(), advantages.clone()
    dirty[:, 1], dirty_ref[:, 1], dirty_advantages[:, 1] = -torch.inf, torch.nan, torch.nan
    dirty.requires_grad_()
    terms = {
        "policy": lambda x, r, a, v: losses.policy_loss(x, a, v, 12)[0],
        "k2": lambda x, r, a, v: losses.kl_loss(x, r, v, 12, "k2")[0],
        "k3": lambda x, r, a, v: losses.kl_loss(x, r, v, 12, "k3")[0],
        "ce": lambda x, r, a, v: losses.cross_entropy(x[:, :, 0, 0], v, 1)[0],
    }
    for name, term in terms.items():
        loss = term(dirty, dirty_ref, dirty_advantages, valid)
        expected = term(clean[:, :1], ref[:, :1], advantages[:, :1], valid[:, :1])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0, msg=name)
        (gradient,) = torch.autograd.grad(loss, dirty)
        assert gradient[:, 0].any(), name
        assert torch.equal(gradient[:, 1], torch.zeros(1, 3, 4, dtype=torch.float64)), name


def test_a_step_with_nothing_to_train_on_is_zero():
    log_probs = torch.full((1, 2, 3, 4), torch.nan).requires_grad_()
    loss, _ = losses.policy_loss(log_probs, torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool), 0)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, log_probs)[0].any()


def test_a_bad_value_at_a_valid_place_shows():
    log_probs = torch.zeros(1, 1, 2, 3)
    log_probs[0, 0, 0, 0] = torch.nan
    assert losses.policy_loss(log_probs, torch.ones(1, 1, 2), torch.ones(1, 1), 6)[0].isnan()


def test_float64_advantages_do_not_change_the_loss_dtype():
    log_probs = torch.zeros(1, 1, 2, 3, requires_grad=True)
    loss, _ = losses.policy_loss(log_probs, sample(1, 1, 2), torch.ones(1, 1, dtype=torch.float64), 6)
    assert loss.dtype == torch.float32


def test_kl_estimates():
    log_probs, ref = -sample(2, 3, 4, 5).abs(), -sample(2, 3, 4, 5, seed=1).abs()
    r = (ref - log_probs).sum(-1)
    torch.testing.assert_close(losses.kl_estimate(log_probs, ref, "k1"), -r)
    torch.testing.assert_close(losses.kl_estimate(log_probs, ref, "k2"), 0.5 * r**2)
    torch.testing.assert_close(losses.kl_estimate(log_probs, ref, "k3"), r.exp() - 1 - r)
    for estimator in ("k1", "k2", "k3"):
        assert not losses.kl_estimate(log_probs, log_probs, estimator).any()
    valid = torch.tensor([[True, False, True], [False, True, True]])
    loss, metrics = losses.kl_loss(log_probs, ref, valid, 80, "k3")
    expected = (r.exp() - 1 - r)[valid].sum() / 80
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert metrics["kl_loss"].item() == loss.item()


def test_mixed_loss():
    policy, ce, kl = (torch.tensor(x, requires_grad=True) for x in (2.0, 3.0, 5.0))
    loss, metrics = losses.mixed_loss(policy, ce, kl, rl_coef=0.5, ce_coef=0.03, beta=0.1)
    assert loss.item() == pytest.approx(0.5 * (2 + 0.1 * 5) + 0.03 * 3) == metrics["loss"].item()
    assert not metrics["loss"].requires_grad
    assert losses.mixed_loss(policy, ce, rl_coef=1.0, ce_coef=0.0)[0].item() == 2.0


def test_unknown_names_and_k1_as_a_loss():
    x = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"loss_normalization='row'.*token, document"):
        losses.loss_weights(torch.ones(1, 2, dtype=torch.bool), "row")
    with pytest.raises(ValueError, match=r"kl_estimator='k4'.*k1, k2, k3"):
        losses.kl_estimate(x, x, "k4")
    with pytest.raises(ValueError, match="kl_estimator='k1' has no mean gradient"):
        losses.kl_loss(x, x, torch.ones(1, 1), 6, "k1")
    with pytest.raises(ValueError, match=r"decay='exp'.*none, linear, cosine"):
        losses.coefficient_at(0, 10, 1.0, decay="exp")


def test_coefficient_schedules():
    def at(**options):
        return [losses.coefficient_at(step, 8, 2.0, **options) for step in range(9)]

    assert at() == [2.0] * 9
    assert at(warmup_steps=3) == [0.5, 1.0, 1.5] + [2.0] * 6
    assert at(decay="linear") == pytest.approx([2 - step / 4 for step in range(9)])
    assert at(decay="cosine") == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(9)])
    assert at(warmup_steps=4, decay="linear") == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 1.5, 1.0, 0.5, 0.0])
