"""Sampling against `generate` on each prefix alone, against the model's own distribution, and against the update."""

import pytest
import torch
from scipy.stats import chisquare

import oracles
from ebft.blocks import BlockLayout
from ebft.logprobs import block_log_probs
from ebft.rollout import _first_above, _normalizer_and_entropy, _search, sample_blocks, sample_rollouts
from ragged import doc_ids_of, ragged_batch
from test_logprobs import Wrapper, lora_model
from tiny_models import CONFIGS, FLOAT32_ONLY, tiny_model

INPUT_IDS, LAYOUT = ragged_batch()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_generate_on_the_prefix_alone(family):
    model, plain = tiny_model(family), tiny_model(family)
    tokens = sample_blocks(model, INPUT_IDS, LAYOUT, 2, temperature=0)
    assert torch.equal(tokens[:, :, 0], tokens[:, :, 1])
    for b, k, start, anchor in oracles.blocks_of(LAYOUT, 3):
        options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        generated = plain.generate(INPUT_IDS[b : b + 1, start:anchor], **options)[0, anchor - start :]
        assert tokens[b, k, 0].tolist() == generated.tolist(), f"row {b}, block {k}"
    assert (tokens[~LAYOUT.valid] == 0).all()
    assert len(tokens[LAYOUT.valid].unique()) > 5, "a model that always says the same proves nothing"


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.7}])
def test_tokens_alone_are_those_with_their_statistics(options):
    model = tiny_model(scale=3.0)
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, generator=seeded(), **options)
    assert torch.equal(sample_blocks(model, INPUT_IDS, LAYOUT, 2, generator=seeded(), **options), rollouts.tokens)
    alone = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, generator=seeded(), statistics=False, **options)
    assert not alone.log_probs.any() and not alone.entropy.any() and alone.entropy.shape == alone.tokens.shape


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probs_and_entropy_of_sampling(family):
    """Those of the update on the same tokens, and of plain runs."""
    model, plain = tiny_model(family), tiny_model(family)
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, temperature=0.7, generator=seeded())
    tolerance = 1e-4 if family in FLOAT32_ONLY or family == "gemma2" else 1e-12
    with torch.no_grad():
        update = block_log_probs(model, INPUT_IDS, rollouts.tokens, LAYOUT, temperature=0.7)
        logits = oracles.block_logits(plain, INPUT_IDS, rollouts.tokens, LAYOUT).double() / 0.7
    torch.testing.assert_close(rollouts.log_probs, update, rtol=0, atol=tolerance)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1) * LAYOUT.valid[..., None, None]
    torch.testing.assert_close(rollouts.entropy.double(), entropy, rtol=0, atol=max(tolerance, 1e-6))
    log_probs = log_probs.gather(-1, rollouts.tokens[..., None])[..., 0] * LAYOUT.valid[..., None, None]
    torch.testing.assert_close(rollouts.log_probs.double(), log_probs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}])
def test_entropy_on_the_support(options):
    """That of the distribution the token is drawn from; of greedy tokens, that at temperature 1."""
    model, plain = tiny_model(scale=3.0), tiny_model(scale=3.0)
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, generator=seeded(), **options)
    temperature, top_k, top_p = options.get("temperature") or 1.0, options.get("top_k", 0), options.get("top_p", 1.0)
    with torch.no_grad():
        logits = oracles.block_logits(plain, INPUT_IDS, rollouts.tokens, LAYOUT).double() / temperature
    ordered = logits.softmax(-1).sort(-1, descending=True).values
    kept = (ordered.cumsum(-1) - ordered < top_p) & (torch.arange(ordered.shape[-1]) < (top_k or ordered.shape[-1]))
    probs = torch.where(kept, ordered, 0)
    probs = probs / probs.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(probs, probs).sum(-1) * LAYOUT.valid[..., None, None]
    torch.testing.assert_close(rollouts.entropy.double(), entropy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("statistics", [True, False])
def test_large_logits(statistics):
    """Of some hundreds, whose exponentials float32 does not hold."""
    model = tiny_model(scale=3.0, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    with torch.no_grad():
        assert model(INPUT_IDS).logits.abs().max() > 200
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, generator=seeded(), statistics=statistics)
    greedy = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, temperature=0)
    assert (rollouts.tokens == greedy.tokens).double().mean() > 0.5
    assert rollouts.entropy.isfinite().all() and rollouts.log_probs.isfinite().all()
    assert rollouts.log_probs.dtype == torch.float32


def test_entropy_under_autocast_is_float32():
    """Of the logits as they are; a dot product would be rounded to bfloat16."""
    logits = torch.randn(64, 500, generator=seeded())
    logits -= logits.amax(-1, keepdim=True)
    plain = _normalizer_and_entropy(logits, logits.exp(), False)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _normalizer_and_entropy(logits, logits.exp(), False)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_tokens_follow_the_models_distribution(temperature):
    V, N = 5, 4000
    plain, model = (tiny_model("llama", vocab_size=V, pad_token_id=None, scale=4.0) for _ in range(2))
    layout = BlockLayout(length=6, stride=2, context_length=2, completion_length=2)
    ids = torch.tensor([[0, 3, 1, 2, 4, 2]])
    tokens = sample_blocks(model, ids, layout, N, temperature=temperature, generator=seeded(1))[0]
    pairs = oracles.completions(V, 2)
    every = pairs.expand(1, layout.num_blocks, -1, -1)
    with torch.no_grad():
        joint = oracles.block_log_probs(plain, ids, every, layout, temperature)[0].sum(-1).exp()  # [K, V * V]
    for k in range(layout.num_blocks):
        counts = (tokens[k] @ torch.tensor([V, 1])).bincount(minlength=V * V)
        first = [(x.view(V, V).sum(-1)) for x in (counts, joint[k])]
        for observed, expected in ((counts, joint[k]), first):
            observed, expected = pool_rare(observed.double(), expected * N)
            assert len(expected) >= 3
            assert chisquare(observed, expected * (N / expected.sum())).pvalue > 1e-4
            # The test can fail: the tempered distribution is told from that at temperature 1.
        wrong = (joint[k] ** temperature / (joint[k] ** temperature).sum()) * N
        assert chisquare(*pool_rare(counts.double(), wrong)).pvalue < 1e-4


def pool_rare(observed, expected):
    """Counts expected below 5 as one cell, as a chi-square test wants them."""
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return observed.numpy(), expected.numpy()


def test_uniforms_make_rollouts_depend_on_their_document_alone():
    """The same document alone, padded, and packed behind another: the same tokens to the last one."""
    sizes = dict(stride=3, context_length=3, completion_length=4)
    ids = torch.randint(3, 61, (14,), generator=seeded(4))
    other = torch.randint(3, 61, (9,), generator=seeded(5))
    alone = BlockLayout.from_documents(doc_ids_of([[14]]), **sizes)
    uniforms = torch.rand(1, alone.num_blocks, 3, 4, dtype=torch.float64, generator=seeded(6))
    model = tiny_model()
    expected = sample_rollouts(model, ids[None], alone, 3, temperature=0.8, uniforms=uniforms)
    regular = BlockLayout(length=14, **sizes)
    for found in (
        sample_rollouts(model, ids[None], regular, 3, temperature=0.8, uniforms=uniforms),
        sample_rollouts(Wrapper(model), ids[None], regular, 3, temperature=0.8, uniforms=uniforms),
    ):
        assert torch.equal(found.tokens, expected.tokens)

    packed = BlockLayout.from_documents(doc_ids_of([[9, 14], [14]], 25), **sizes)
    rows = torch.zeros(2, 25, dtype=torch.long)
    rows[0, :9], rows[0, 9:23], rows[1, :14] = other, ids, ids
    noise = torch.rand(2, packed.num_blocks, 3, 4, dtype=torch.float64, generator=seeded(7))
    mine = packed.prefix_starts[0] == 9
    noise[0, mine], noise[1, : alone.num_blocks] = uniforms[0], uniforms[0]
    found = sample_rollouts(model, rows, packed, 3, temperature=0.8, uniforms=noise)
    assert torch.equal(found.tokens[0, mine], expected.tokens[0])
    assert torch.equal(found.tokens[1, : alone.num_blocks], expected.tokens[0])
    torch.testing.assert_close(found.log_probs[0, mine], expected.log_probs[0], rtol=0, atol=1e-12)


def test_generator_decides():
    model = tiny_model()
    draws = [sample_blocks(model, INPUT_IDS, LAYOUT, 3, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    assert torch.equal(sample_blocks(model, INPUT_IDS, LAYOUT, 3, generator=seeded(0)), draws[0])
    assert torch.equal(torch.get_rng_state(), state), "with a generator the default one is left alone"
    torch.manual_seed(3)
    default = sample_blocks(model, INPUT_IDS, LAYOUT, 3)
    torch.manual_seed(3)
    assert torch.equal(sample_blocks(model, INPUT_IDS, LAYOUT, 3), default)


def test_extreme_uniforms_draw_tokens_of_the_support():
    """Rounding a number just below one to one would draw the last token of the vocabulary, however unlikely."""
    model = tiny_model(dtype=torch.float32)
    shape = (3, LAYOUT.num_blocks, 2, 4)
    for value in (0.0, 1 - 2**-53):
        noise = torch.full(shape, value, dtype=torch.float64)
        found = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, top_k=3, uniforms=noise)
        assert found.log_probs[LAYOUT.valid].isfinite().all()


@pytest.mark.parametrize("vocabulary", [5, 128, 300, 1024])
@pytest.mark.parametrize("share", [1.0, 0.02])
def test_search_in_two_steps_is_one_in_the_cumulative_sum(vocabulary, share):
    """Of weights of which only a share is not 0; in float32 up to rounding, and never a token without weight."""
    generator = seeded()
    weights = torch.rand(50, vocabulary, generator=generator, dtype=torch.float64).pow(4)
    weights *= torch.rand(weights.shape, generator=generator) < share
    weights[:, torch.randint(vocabulary, (1,), generator=generator)] += 0.1
    noise = torch.rand(50, 40, generator=generator, dtype=torch.float64)
    noise[:, :2] = torch.tensor([0.0, 1 - 2**-53])
    cumulative = weights.cumsum(-1)
    plain = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)
    assert torch.equal(_search(weights, noise)[:, 2:], plain[:, 2:])
    for dtype in (torch.float32, torch.float64):
        found = _search(weights.to(dtype), noise.to(torch.float32))
        assert (weights.gather(-1, found) > 0).all()
        above = cumulative.gather(-1, found) / cumulative[:, -1:]
        below = above - weights.gather(-1, found) / cumulative[:, -1:]
        assert ((below < noise + 1e-5) & (noise - 1e-5 < above)).all()


def test_a_height_on_the_border_of_two_columns_is_none_below_the_second():
    weights = torch.rand(50, 300, generator=seeded())
    at, within = _first_above(weights, weights.cumsum(-1)[:, :-1])
    assert torch.equal(at, torch.arange(1, 300).expand(50, -1))
    assert (within >= 0).all()
    assert (within < 1e-3).all()


def test_sampling_leaves_the_model_in_its_mode():
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    expected = sample_rollouts(tiny_model(), INPUT_IDS, LAYOUT, 2, generator=seeded())
    found = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, generator=seeded())
    assert torch.equal(found.log_probs, expected.log_probs), "dropout is off inside"
    assert [m.training for m in model.modules()] == before
    assert not found.log_probs.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(num_generations=0), "num_generations=0"),
    ],
)
def test_number_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        sample_blocks(tiny_model(), INPUT_IDS, LAYOUT, **dict(num_generations=2) | options)


def test_more_rollouts_than_fit_into_a_chunk():
    model, n = tiny_model("mistral_window"), 600
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, n, generator=seeded())
    assert rollouts.tokens.shape == (3, 4, n, 4)
    few = [0, 127, 128, 599]
    expected = oracles.block_log_probs(tiny_model("mistral_window"), INPUT_IDS, rollouts.tokens[:, :, few], LAYOUT)
    torch.testing.assert_close(rollouts.log_probs[:, :, few], expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        update = block_log_probs(model, INPUT_IDS, rollouts.tokens, LAYOUT)
    torch.testing.assert_close(rollouts.log_probs, update, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_one_token_blocks(temperature):
    model = tiny_model()
    layout = BlockLayout.from_documents(LAYOUT.doc_ids, stride=2, context_length=1, completion_length=1)
    rollouts = sample_rollouts(model, INPUT_IDS, layout, 3, temperature=temperature, generator=seeded())
    expected = oracles.block_log_probs(tiny_model(), INPUT_IDS, rollouts.tokens, layout, temperature or 1.0)
    torch.testing.assert_close(rollouts.log_probs, expected, rtol=0, atol=1e-12)


def test_no_block_at_all():
    layout = BlockLayout.from_documents(doc_ids_of([[4], [2, 2]]), stride=1, context_length=3, completion_length=3)
    rollouts = sample_rollouts(tiny_model(), INPUT_IDS[:2, :4], layout, 5)
    assert all(x.shape == (2, 0, 5, 3) for x in rollouts[:3])


def test_adapters_take_part():
    model = lora_model()
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, 2, generator=seeded())
    with torch.no_grad():
        update = block_log_probs(model, INPUT_IDS, rollouts.tokens, LAYOUT)
        base = block_log_probs(tiny_model(), INPUT_IDS, rollouts.tokens, LAYOUT)
    torch.testing.assert_close(rollouts.log_probs, update, rtol=0, atol=1e-5)
    assert (rollouts.log_probs - base).abs().max() > 0.5
