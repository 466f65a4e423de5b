"""Features against one plain run per rollout; the model they are read from stays as it is."""

import copy
import itertools

import pytest
import torch
from torch import nn

import oracles
from ebft.blocks import BlockLayout
from ebft.features import NORMS, POOLINGS, REDUCTIONS, FeatureNetwork, decoder_up_to, layer_indices
from ebft.forward import install
from ragged import doc_ids_of, ragged_batch, random_tokens
from test_logprobs import lora_model
from tiny_models import CONFIGS, FLOAT32_ONLY, tiny_model

INPUT_IDS, LAYOUT = ragged_batch()
TOKENS = random_tokens(LAYOUT, 3, 2)


def expected_features(model, indices, pooling="last_token", norm="joint", reduction="concat", tokens=TOKENS):
    """`{(row, block): (generated [N, ...], reference [...])}`, every rollout a run of its own."""
    G, features = LAYOUT.completion_length, {}
    for b, k, start, anchor in oracles.blocks_of(LAYOUT, len(INPUT_IDS)):
        prefix, reference = INPUT_IDS[b, start:anchor], INPUT_IDS[b, anchor : anchor + G]
        runs = [
            oracles.pool(
                oracles.token_features(model, indices, torch.cat([prefix, block]), norm, reduction)[-G:], pooling
            )
            for block in (*tokens[b, k], reference)
        ]
        features[b, k] = (torch.stack(runs[:-1]), runs[-1])
    return features


def assert_features(phi: FeatureNetwork, expected: dict, tolerance: float):
    generated, reference = phi(INPUT_IDS, TOKENS, LAYOUT)
    for (b, k), (gen, ref) in expected.items():
        mine = generated[b, k].transpose(0, 1) if phi.pooling == "token" else generated[b, k]  # [N, ...]
        torch.testing.assert_close(mine.double(), gen, rtol=0, atol=tolerance * gen.abs().max().item())
        torch.testing.assert_close(reference[b, k].double(), ref, rtol=0, atol=tolerance * ref.abs().max().item())
    assert (generated[~LAYOUT.valid] == 0).all() and (reference[~LAYOUT.valid] == 0).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family):
    """Taps at the middle, below the top, and after the final norm."""
    with torch.no_grad():
        expected = expected_features(tiny_model(family), [2, 3, 4])
    phi = FeatureNetwork(tiny_model(family), layers=(0.5, 0.75, 1.0))
    assert_features(phi, expected, 1e-4 if family in FLOAT32_ONLY else 1e-6)


@pytest.mark.parametrize(("pooling", "norm", "reduction"), list(itertools.product(POOLINGS, NORMS, REDUCTIONS)))
def test_poolings_norms_and_reductions(pooling, norm, reduction):
    with torch.no_grad():
        expected = expected_features(tiny_model("gpt2"), [1, 3], pooling, norm, reduction)
    phi = FeatureNetwork(tiny_model("gpt2"), (1, 3), pooling, norm, reduction)
    assert_features(phi, expected, 1e-12)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [((0.25, 0.5, 0.75), [1, 2, 3]), ((0.1,), [1]), ((1.0,), [4]), ((4,), [4]), ((1,), [1]), ((3, 0.5), [3, 2])],
)
def test_layers(layers, indices):
    assert layer_indices(layers, 4) == indices
    with torch.no_grad():
        expected = expected_features(tiny_model("gpt2"), indices, norm="none")
    assert_features(FeatureNetwork(tiny_model("gpt2"), layers, norm="none"), expected, 1e-12)


def test_paper_layers():
    """floor(L / 4), floor(L / 2), floor(3 L / 4)."""
    assert layer_indices((0.25, 0.5, 0.75), 28) == [7, 14, 21]
    assert layer_indices((0.25, 0.5, 0.75), 30) == [7, 15, 22]
    assert layer_indices((0.25, 0.5, 0.75), 2) == [1, 1, 1]


@pytest.mark.parametrize(("pooling", "shape"), [("last_token", (64,)), ("mean_pooling", (64,)), ("concat", (256,))])
def test_shapes(pooling, shape):
    generated, reference = FeatureNetwork(tiny_model(), (1, 2), pooling)(INPUT_IDS, TOKENS, LAYOUT)
    assert generated.shape == (3, 4, 2, *shape) and reference.shape == (3, 4, *shape)


def test_shapes_per_token():
    generated, reference = FeatureNetwork(tiny_model(), (1, 2), "token")(INPUT_IDS, TOKENS, LAYOUT)
    assert generated.shape == (3, 4, 4, 2, 64) and reference.shape == (3, 4, 4, 64)
    regular = BlockLayout(length=22, stride=5, context_length=3, completion_length=2)
    generated, _ = FeatureNetwork(tiny_model(), (1,), "token")(INPUT_IDS, random_tokens(regular, 3, 5), regular)
    assert generated.shape == (3, 4, 2, 5, 32)


def test_no_block_at_all():
    layout = BlockLayout.from_documents(doc_ids_of([[4], [2, 2]]), stride=1, context_length=3, completion_length=3)
    generated, reference = FeatureNetwork(tiny_model())(INPUT_IDS[:2, :4], random_tokens(layout, 2, 3), layout)
    assert generated.shape == (2, 0, 3, 96) and reference.shape == (2, 0, 96)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncation_at_the_top_tap_is_exact(family, dtype):
    model = tiny_model(family, dtype=dtype)
    calls = []
    for layer in decoder_up_to(model.base_model, 4).get_submodule("h" if family == "gpt2" else "layers"):
        layer.register_forward_hook(lambda *args: calls.append(1))
    cut, whole = (FeatureNetwork(model, layers, norm="none") for layers in ((1, 2), (1, 2, 4)))
    mine = cut(INPUT_IDS, TOKENS, LAYOUT)
    assert len(calls) == 2
    theirs = whole(INPUT_IDS, TOKENS, LAYOUT)
    assert len(calls) == 2 + 4
    assert all(torch.equal(a, b[..., :64]) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("wrap", ["plain", "peft"])
def test_model_stays_as_it_is(wrap, installed):
    model = tiny_model() if wrap == "plain" else lora_model()
    if installed:
        install(model)
    model.train()
    list(model.modules())[5].eval()
    attention = {id(m): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}

    def state():
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in model.modules()
        ]
        return modules, [(n, p.requires_grad, p.dtype, p.grad is None, id(p)) for n, p in model.named_parameters()]

    before, weights = state(), copy.deepcopy(model.state_dict())
    generated, reference = FeatureNetwork(model, layers=(0.5, 0.75))(INPUT_IDS, TOKENS, LAYOUT)
    assert not generated.requires_grad and not reference.requires_grad
    assert state() == before
    assert attention == {id(m): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    out = model(INPUT_IDS).logits
    assert out.requires_grad


def test_dropout_is_off():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    expected = FeatureNetwork(tiny_model("gpt2"))(INPUT_IDS, TOKENS, LAYOUT)
    found = FeatureNetwork(model)(INPUT_IDS, TOKENS, LAYOUT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equal_rollouts_have_equal_features(pooling, dtype):
    """To the last bit, wherever they lie in the row; and prefixes that agree have equal features per token."""
    n = 90  # more than a chunk: the last chunk has another shape, and so other rounding
    tokens = random_tokens(LAYOUT, 3, n, vocab_size=3)
    model = tiny_model(dtype=dtype)
    generated, _ = FeatureNetwork(model, (1, 2, 3), pooling)(INPUT_IDS, tokens, LAYOUT)
    assert generated.dtype == torch.float32
    generated = generated if pooling == "token" else generated[:, :, None]
    for s in range(generated.shape[2]):
        same = slice(0, s + 1) if pooling == "token" else slice(0, 4)
        for b, k in LAYOUT.valid.nonzero().tolist():
            _, group, counts = tokens[b, k, :, same].unique(dim=0, return_inverse=True, return_counts=True)
            assert counts.max() > 1
            assert len(generated[b, k, s].unique(dim=0)) == len(counts)
            for g in range(len(counts)):
                assert (generated[b, k, s][group == g] == generated[b, k, s][group == g][0]).all()


def test_half_precision_network_gives_float32():
    generated, reference = FeatureNetwork(tiny_model(dtype=torch.bfloat16))(INPUT_IDS, TOKENS, LAYOUT)
    exact, _ = FeatureNetwork(tiny_model())(INPUT_IDS, TOKENS, LAYOUT)
    assert generated.dtype == reference.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(generated.norm(dim=-1), LAYOUT.valid[..., None].expand(-1, -1, 2).float())
    assert ((generated * exact).sum(-1)[LAYOUT.valid] > 0.99).all()


def test_trained_adapters_are_off():
    model = lora_model()
    expected = FeatureNetwork(tiny_model())(INPUT_IDS, TOKENS, LAYOUT)
    phi = FeatureNetwork(model)
    found = phi(INPUT_IDS, TOKENS, LAYOUT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with model.disable_adapter():
        phi(INPUT_IDS, TOKENS, LAYOUT)
    merged = FeatureNetwork(model.merge_and_unload())(INPUT_IDS, TOKENS, LAYOUT)
    assert (merged[0] - expected[0]).abs().max() > 0.1, "and on they would matter"


def test_decoder_alone_is_enough():
    expected = FeatureNetwork(tiny_model())(INPUT_IDS, TOKENS, LAYOUT)
    found = FeatureNetwork(copy.deepcopy(decoder_up_to(tiny_model().model, 3)))(INPUT_IDS, TOKENS, LAYOUT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pooling="max"), "pooling='max'.*last_token"),
        (dict(norm="l1"), "feature_norm='l1'.*per_layer"),
        (dict(reduction="sum"), "feature_reduction='sum'.*mean"),
        (dict(layers=(0.5, 5)), r"feature_layers=\[0.5, 5\]: 5 is out of range.*1..4"),
        (dict(layers=(0,)), "feature_layers.*0 is out of range"),
        (dict(layers=(0.0,)), "feature_layers.*0.0 is out of range"),
        (dict(layers=(1.5,)), "feature_layers.*1.5 is out of range"),
        (dict(layers=()), "feature_layers is empty"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureNetwork(tiny_model(), **options)


def test_model_without_layers():
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        decoder_up_to(nn.Linear(2, 2), 1)
