"""The weighted sum of log-probs and the forward that samples and trains at once, against log-probs taken apart."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

import oracles
from ebft import lm_head
from ebft.attention import BlockCache
from ebft.blocks import BlockLayout
from ebft.forward import causal_lm
from ebft.logprobs import LogProbs, document_and_block_log_probs, document_and_block_loss
from ebft.rollout import sample_and_sum, sample_rollouts
from ragged import doc_ids_of, ragged_batch, random_tokens
from test_logprobs import Wrapper, assert_same_gradients, lora_model
from tiny_models import CONFIGS, FLOAT32_ONLY, tiny_model

INPUT_IDS, LAYOUT = ragged_batch()
N = 3
SHAPE = (*LAYOUT.expand(len(INPUT_IDS))[0].shape, N, LAYOUT.completion_length)
TOKENS = random_tokens(LAYOUT, 3, N)
SUPPORTS = [dict(temperature=0.6), dict(temperature=0.8, top_k=7), dict(temperature=1.0, top_p=0.7)]


def weights(dtype=torch.float64) -> LogProbs:
    generator = torch.Generator().manual_seed(4)
    shapes = (INPUT_IDS.shape[0], INPUT_IDS.shape[1] - 1), SHAPE
    return LogProbs(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def uniforms() -> torch.Tensor:
    return torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def apart(model, tokens, **options):
    """Loss, log-probs and gradients by the log-probs and autograd."""
    log_probs = document_and_block_log_probs(model, INPUT_IDS, tokens, LAYOUT, **options)
    loss = sum((w * x).sum() for w, x in zip(weights(), log_probs, strict=True))
    return loss.detach(), log_probs, gradients(model, loss)


def tolerance_of(family: str) -> float:
    return 1e-4 if family in FLOAT32_ONLY else 1e-5 if family == "gemma2" else 1e-11


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("support", SUPPORTS[:1])
def test_weighted_sum_is_the_sum_of_weighted_log_probs(family, support):
    expected, log_probs, expected_gradients = apart(tiny_model(family), TOKENS, **support)
    model, tolerance = tiny_model(family), tolerance_of(family)
    loss, found = document_and_block_loss(model, INPUT_IDS, TOKENS, LAYOUT, weights(), **support)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-9)
    for mine, theirs in zip(found, log_probs, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=tolerance)
    assert_same_gradients(gradients(model, loss), expected_gradients, max(tolerance, 2e-6))


@pytest.mark.parametrize("support", SUPPORTS, ids=["full", "top_k", "top_p"])
@pytest.mark.parametrize("rows", [1, 10**6], ids=["many_chunks", "one_chunk"])
def test_weighted_sum_on_every_support_in_any_chunks(monkeypatch, support, rows):
    # Rollouts drawn on the support, as in training.
    tokens = sample_rollouts(tiny_model(), INPUT_IDS, LAYOUT, N, uniforms=uniforms(), **support).tokens
    expected, _, expected_gradients = apart(tiny_model(), tokens, **support)
    monkeypatch.setattr(lm_head, "LOGITS_PER_CHUNK_ON_CPU", rows)
    monkeypatch.setattr(lm_head, "FEWEST_ROWS", 16)
    model = tiny_model()
    loss, _ = document_and_block_loss(model, INPUT_IDS, tokens, LAYOUT, weights(), **support)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert_same_gradients(gradients(model, loss), expected_gradients, 2e-6)


def test_head_runs_once_for_the_weighted_sum():
    def rows_through_the_head(run) -> int:
        model, rows = tiny_model(), []
        model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
        run(model)
        return sum(rows)

    once = rows_through_the_head(
        lambda m: document_and_block_loss(m, INPUT_IDS, TOKENS, LAYOUT, weights())[0].backward()
    )
    # One more row, to find out whose gradient is wanted.
    assert rows_through_the_head(lambda m: apart(m, TOKENS)) == 2 * (once - 1) > 0


class Borrowing(nn.Module):
    """A head that computes with a weight of the decoder's."""

    def __init__(self, model):
        super().__init__()
        self.weight_of = lambda: model.model.embed_tokens.weight

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight_of())


def test_head_with_a_weight_it_does_not_own():
    plain, model = (tiny_model("llama") for _ in range(2))
    for m in (plain, model):
        m.lm_head = Borrowing(m)
    log_probs = document_and_block_log_probs(plain, INPUT_IDS, TOKENS, LAYOUT)
    expected = gradients(plain, sum((w * x).sum() for w, x in zip(weights(), log_probs, strict=True)))
    loss, _ = document_and_block_loss(model, INPUT_IDS, TOKENS, LAYOUT, weights())
    assert_same_gradients(gradients(model, loss), expected, 2e-6)


def test_adapter_of_the_head_that_takes_no_part():
    model = lora_model(target_modules=["lm_head"])
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["lm_head"]))
    for parameter in model.parameters():
        parameter.requires_grad = True
    loss, _ = document_and_block_loss(model, INPUT_IDS, TOKENS, LAYOUT, weights())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all((grad is None) == ("idle" in name) for name, grad in grads.items())


def test_impossible_token_without_weight_leaves_the_loss_finite():
    model, one = tiny_model(), weights()
    target = int(INPUT_IDS[0, 3])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([target]), float("-inf"))
    )
    zero = one._replace(
        document=one.document.masked_fill(INPUT_IDS[:, 1:] == target, 0),
        blocks=one.blocks.masked_fill(target == TOKENS, 0),
    )
    loss, _ = document_and_block_loss(model, INPUT_IDS, TOKENS, LAYOUT, zero)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_blocks_without_weight_are_left_out():
    """Same loss and gradient, fewer tokens; a row may lose all its blocks, another none."""
    some = weights()
    blocks = some.blocks.clone()
    blocks[:, 1::2] = 0
    blocks[0] = 0
    blocks[1, 3, 0, 0] = 0  # a single weight of zero leaves its block where it is
    some = some._replace(blocks=blocks)
    zero = (blocks == 0).flatten(2).all(-1)
    plain, model, seen = tiny_model(), tiny_model(), []
    log_probs = document_and_block_log_probs(plain, INPUT_IDS, TOKENS, LAYOUT)
    expected = sum((w * x).sum() for w, x in zip(some, log_probs, strict=True))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    loss, found = document_and_block_loss(model, INPUT_IDS, TOKENS, LAYOUT, some)
    kept = int((~zero & LAYOUT.valid).sum(-1).max())
    assert seen == [LAYOUT.length + kept * N * (LAYOUT.completion_length - 1)] and kept < LAYOUT.num_blocks
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert (found.blocks[zero] == 0).all() and zero.any()
    torch.testing.assert_close(found.blocks[~zero], log_probs.blocks[~zero].detach(), rtol=0, atol=1e-11)
    assert_same_gradients(gradients(model, loss), gradients(plain, expected), 2e-6)

    nothing = some._replace(blocks=torch.zeros_like(blocks))
    loss, found = document_and_block_loss(model, INPUT_IDS, TOKENS, LAYOUT, nothing)
    assert seen[-1] == LAYOUT.length and (found.blocks == 0).all()
    assert loss.item() == pytest.approx((some.document * log_probs.document).sum().item(), rel=1e-11)


def test_loss_may_be_scaled():
    once, thrice = tiny_model(), tiny_model()
    loss, _ = document_and_block_loss(once, INPUT_IDS, TOKENS, LAYOUT, weights())
    expected = {name: 3 * g for name, g in gradients(once, loss).items()}
    loss, _ = document_and_block_loss(thrice, INPUT_IDS, TOKENS, LAYOUT, weights())
    assert_same_gradients(gradients(thrice, 3 * loss), expected, 2e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_one_forward_samples_and_trains(family):
    """The tokens of sampling, the loss and the gradient of a second forward over them."""
    options = dict(temperature=0.6)
    model, tolerance = tiny_model(family), tolerance_of(family)
    rollouts = sample_rollouts(tiny_model(family), INPUT_IDS, LAYOUT, N, uniforms=uniforms(), **options)
    given = []

    def weigh(drawn):
        given.append(drawn)
        return weights()

    loss, log_probs, drawn = sample_and_sum(model, INPUT_IDS, LAYOUT, N, weigh, uniforms=uniforms(), **options)
    assert len(given) == 1 and torch.equal(given[0].tokens, drawn.tokens)
    for mine, theirs in zip(drawn[:3], rollouts[:3], strict=True):
        assert torch.equal(mine, theirs)
    expected, expected_log_probs, expected_gradients = apart(tiny_model(family), drawn.tokens, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-9)
    for mine, theirs in zip(log_probs, expected_log_probs, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=tolerance)
    torch.testing.assert_close(log_probs.blocks, drawn.log_probs, rtol=0, atol=tolerance)
    assert_same_gradients(gradients(model, loss), expected_gradients, max(tolerance, 2e-6))


@pytest.mark.parametrize("make", [tiny_model, lora_model])
def test_one_forward_is_one_call_of_the_wrapped_model(make):
    plain, inner = make(), make()
    wrapper = Wrapper(inner)
    loss, _, _ = sample_and_sum(wrapper, INPUT_IDS, LAYOUT, N, lambda _: weights(), uniforms=uniforms())
    expected, _, _ = sample_and_sum(plain, INPUT_IDS, LAYOUT, N, lambda _: weights(), uniforms=uniforms())
    assert wrapper.calls == 1
    assert_same_gradients(gradients(inner, loss), gradients(plain, expected), 0.0)


def test_one_forward_touches_every_token_once():
    """The counted work, to the token: documents and all fed tokens of the rollouts, each a single time."""
    model, layout = tiny_model(), BlockLayout(length=22, stride=3, context_length=2, completion_length=4)
    seen = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    shapes = (len(INPUT_IDS), 21), (len(INPUT_IDS), layout.num_blocks, N, 4)
    ones = LogProbs(*(torch.ones(shape) for shape in shapes))
    sample_and_sum(model, INPUT_IDS, layout, N, lambda _: ones)[0].backward()
    assert len(seen) == 4
    assert sum(seen) == len(INPUT_IDS) * (22 + layout.num_blocks * N * 3)


def test_documents_mask_and_blocks_that_are_not_there():
    doc_ids = doc_ids_of([[9], [4, 5]])
    layout = BlockLayout.from_documents(doc_ids, stride=2, context_length=2, completion_length=3)
    ids, mask = INPUT_IDS[:2, :9], torch.zeros(2, 8, dtype=torch.bool)
    assert not layout.valid.all()
    shape = (*layout.valid.shape, N, 3)
    ones = LogProbs(torch.ones(2, 8), torch.ones(shape))
    loss, log_probs, drawn = sample_and_sum(tiny_model(), ids, layout, N, lambda _: ones, document_mask=mask)
    assert (log_probs.document == 0).all() and (drawn.tokens[~layout.valid] == 0).all()
    expected = oracles.block_log_probs(tiny_model(), ids, drawn.tokens, layout, 1.0)
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-11)


def test_stale_cache_shows(monkeypatch):
    """The comparisons above can fail: a cache that repeats an old step instead of the new one gives other numbers."""
    update = BlockCache.update

    def stale(self, key_states, value_states, layer_idx, *args, **kwargs):
        before = self.own[layer_idx] if layer_idx < len(self.own) else None
        if before is not None:
            length = key_states.shape[2]
            key_states, value_states = (x[:, :, -length:] for x in before)
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    monkeypatch.setattr(BlockCache, "update", stale)
    drawn = sample_rollouts(tiny_model(), INPUT_IDS, LAYOUT, N, uniforms=uniforms())
    expected = oracles.block_log_probs(tiny_model(), INPUT_IDS, drawn.tokens, LAYOUT, 1.0)
    error = (drawn.log_probs - expected).abs()[LAYOUT.valid]
    assert error[..., :2].max() < 1e-11, "the first fed token is not stale"
    assert error[..., 2:].max() > 0.01


def test_bf16_stays_near_float32():
    """Autocast, with float32 weights: loss within 1 %, gradient within 5 % of its length."""
    plain = tiny_model(dtype=torch.float32, scale=2.0)
    model = copy.deepcopy(plain)

    def run(m):
        loss, _ = document_and_block_loss(m, INPUT_IDS, TOKENS, LAYOUT, weights(torch.float32))
        return loss, gradients(m, loss)

    expected, expected_gradients = run(plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = run(model)
    assert loss.item() != expected.item() and loss.item() == pytest.approx(expected.item(), rel=0.01)
    flat, expected_flat = (torch.cat([g.flatten() for g in x.values()]) for x in (found, expected_gradients))
    assert flat.dtype == torch.float32
    assert 0 < (flat - expected_flat).norm() < 0.05 * expected_flat.norm()
    assert causal_lm(model) is model
