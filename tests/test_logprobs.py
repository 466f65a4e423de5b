"""Log-probs of documents and rollouts, and their gradients, against one plain run per rollout; for every family."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn

import oracles
from ebft import lm_head
from ebft.blocks import BlockLayout
from ebft.forward import causal_lm, install
from ebft.lm_head import restrict
from ebft.logprobs import block_log_probs, document_and_block_log_probs
from ebft.rollout import sample_rollouts
from ragged import doc_ids_of, ragged_batch, random_tokens
from tiny_models import CONFIGS, FLOAT32_ONLY, tiny_model

TEMPERATURE = 0.6
INPUT_IDS, LAYOUT = ragged_batch()
TOKENS = random_tokens(LAYOUT, 3, 2)
UNIFORMS = torch.rand(*LAYOUT.expand(len(INPUT_IDS))[0].shape, 2, LAYOUT.completion_length, dtype=torch.float64)


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model is its `module`, and its own call is what hooks hang on."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def weighted_sum(document, blocks):
    """A number whose gradient depends on every log-prob in a different way."""
    generator = torch.Generator().manual_seed(3)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (document, blocks))


def gradients(model: nn.Module, document, blocks) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(weighted_sum(document, blocks), list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_same_gradients(mine: dict, expected: dict, tolerance: float):
    assert set(mine) == set(expected)
    assert any(g.abs().max() > 0.1 for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(
            mine[name], g, rtol=0, atol=tolerance * (1 + g.abs().max().item()), msg=lambda m, name=name: f"{name}: {m}"
        )


def ours(model, **options):
    return document_and_block_log_probs(model, INPUT_IDS, TOKENS, LAYOUT, **dict(temperature=TEMPERATURE) | options)


@pytest.mark.parametrize("family", CONFIGS)
def test_values_and_gradients_are_those_of_plain_runs(family):
    model, plain = tiny_model(family), tiny_model(family)
    # Some families compute in float32 here and there, whatever their weights are.
    tolerance = 1e-4 if family in FLOAT32_ONLY else 1e-5 if family == "gemma2" else 1e-12
    expected = (
        oracles.document_log_probs(plain, INPUT_IDS, LAYOUT.doc_ids),
        oracles.block_log_probs(plain, INPUT_IDS, TOKENS, LAYOUT, TEMPERATURE),
    )
    result = ours(model)
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance)
    expected_gradients = gradients(plain, *expected)
    assert_same_gradients(gradients(model, *result), expected_gradients, max(tolerance, 2e-6))


@pytest.mark.parametrize("family", CONFIGS)
def test_document_log_probs_are_those_of_the_logits(family):
    """One position predicts the next token at temperature 1 and the rollouts' first tokens at another."""
    model, layout = tiny_model(family), BlockLayout(length=22, stride=3, context_length=2, completion_length=3)
    tokens = random_tokens(layout, 3, 2)
    with torch.no_grad():
        document, blocks = document_and_block_log_probs(model, INPUT_IDS, tokens, layout, temperature=TEMPERATURE)
        logits = tiny_model(family)(INPUT_IDS).logits.double()
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, INPUT_IDS[:, 1:, None])[..., 0]
    first = (logits / TEMPERATURE).log_softmax(-1)[:, layout.anchors - 1].gather(-1, tokens[..., 0])
    tolerance = 1e-4 if family in FLOAT32_ONLY else 1e-5
    torch.testing.assert_close(document.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(blocks[..., 0].double(), first, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied):
    model, plain = (tiny_model("qwen2", tie_word_embeddings=tied) for _ in range(2))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    expected = (
        oracles.document_log_probs(plain, INPUT_IDS, LAYOUT.doc_ids),
        oracles.block_log_probs(plain, INPUT_IDS, TOKENS, LAYOUT, TEMPERATURE),
    )
    assert_same_gradients(gradients(model, *ours(model)), gradients(plain, *expected), 2e-6)


def test_wrong_anchors_show():
    """The comparison above can fail: a layout off by one gives other numbers."""
    expected = oracles.block_log_probs(tiny_model(), INPUT_IDS, TOKENS, LAYOUT, TEMPERATURE)
    shifted = LAYOUT.select(LAYOUT.valid)
    shifted.anchors[shifted.valid] -= 1
    error = (block_log_probs(tiny_model(), INPUT_IDS, TOKENS, shifted, temperature=TEMPERATURE) - expected).abs()
    assert error[LAYOUT.valid].amax(-1).min() > 0.01


def test_block_log_probs_alone():
    expected = ours(tiny_model()).blocks
    assert torch.equal(block_log_probs(tiny_model(), INPUT_IDS, TOKENS, LAYOUT, temperature=TEMPERATURE), expected)
    assert (expected[~LAYOUT.valid] == 0).all() and (expected[LAYOUT.valid] < 0).all()


@pytest.fixture
def bf16_accelerator():
    """An Accelerator of its own: accelerate keeps one global state, which other tests may have set to float32."""
    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_bf16_autocast(family, bf16_accelerator):
    """Autocast sits in the outermost forward, as accelerate puts it there; weights stay float32."""
    plain = tiny_model(family, dtype=torch.float32, scale=2.0)
    expected = [x.detach() for x in ours(copy.deepcopy(plain))]
    install(plain)
    model = bf16_accelerator.prepare_model(plain)
    seen = set()
    for module in plain.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    result = ours(model)
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for mine, theirs in zip(result, expected, strict=True):
        assert mine.dtype == torch.float32
        assert not torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.1)  # nats; the log-probs' own spread is several nats
        assert (mine - theirs).abs().mean() < 0.01
    grads = gradients(plain, *result)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


def test_chunks_of_logits_change_nothing(monkeypatch):
    whole, cut = tiny_model(), tiny_model()
    result = ours(whole)
    expected = gradients(whole, *result)
    monkeypatch.setattr(lm_head, "LOGITS_PER_CHUNK_ON_CPU", 1)
    monkeypatch.setattr(lm_head, "FEWEST_ROWS", 16)
    rows = []
    hook = cut.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
    chunked = ours(cut)
    assert len(rows) > 5 and max(rows) == 16
    hook.remove()
    for mine, theirs in zip(chunked, result, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    assert_same_gradients(gradients(cut, *chunked), expected, 2e-6)


def test_logits_only_where_a_log_prob_is_read():
    model = tiny_model()
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
    mask = torch.zeros(3, 21, dtype=torch.bool)
    mask[2, 20] = mask[2, 2] = True  # the second is predicted from where a block starts: no further row
    with torch.no_grad():
        ours(model, document_mask=mask)
    G, N, blocks = 4, 2, int(LAYOUT.valid.sum())
    assert sum(rows) == blocks + 1 + blocks * N * (G - 1)


def test_gradient_checkpointing():
    model, plain = tiny_model(), tiny_model()
    expected = gradients(plain, *ours(plain))
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    result = ours(model)
    assert_same_gradients(gradients(model, *result), expected, 2e-6)
    assert len(calls) == 2, "the layer is run again in the backward"
    assert model.training


@pytest.mark.parametrize("support", [dict(top_k=3), dict(top_p=0.8), dict(top_k=4, top_p=0.7)])
def test_restricted_support(support):
    """Log-probs are on the support sampled from, where probabilities sum to one."""
    model, plain, N = tiny_model(), tiny_model(), 30
    generator = torch.Generator().manual_seed(0)
    rollouts = sample_rollouts(model, INPUT_IDS, LAYOUT, N, temperature=1.5, generator=generator, **support)
    with torch.no_grad():
        log_probs = block_log_probs(model, INPUT_IDS, rollouts.tokens, LAYOUT, temperature=1.5, **support)
        probs = (oracles.block_logits(plain, INPUT_IDS, rollouts.tokens, LAYOUT) / 1.5).softmax(-1)
    torch.testing.assert_close(log_probs, rollouts.log_probs, rtol=0, atol=1e-12)
    likeliest, order = probs.sort(-1, descending=True)
    likeliest[..., support.get("top_k", 61) :] = 0
    likeliest /= likeliest.sum(-1, keepdim=True)
    likeliest[likeliest.cumsum(-1) - likeliest >= support.get("top_p", 1.0)] = 0  # what comes before is enough
    probs = torch.zeros_like(probs).scatter(-1, order, likeliest / likeliest.sum(-1, keepdim=True))
    expected = probs.gather(-1, rollouts.tokens[..., None])[..., 0].log()
    torch.testing.assert_close(log_probs[LAYOUT.valid], expected[LAYOUT.valid], rtol=0, atol=1e-12)
    assert (probs == 0).sum(-1).min() > 5, "the support is a restriction"


def test_restrict_keeps_the_drawn_token():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    inf = float("inf")
    assert restrict(logits, 0.5, top_k=2).tolist() == [[6.0, 4.0, -inf, -inf]]
    assert restrict(logits, 1.0, top_k=2, keep=torch.tensor([[3]])).tolist() == [[3.0, 2.0, -inf, 0.0]]
    assert restrict(logits, 1.0, top_p=0.6).tolist() == [[3.0, -inf, -inf, -inf]]


def test_no_given_token_is_outside_the_support():
    """Rounding in the update must not push a drawn token out: its log-prob would be -inf."""
    assert block_log_probs(tiny_model(), INPUT_IDS, TOKENS, LAYOUT, top_k=1, top_p=0.1).isfinite().all()


def test_document_mask():
    everywhere = ours(tiny_model()).document
    mask = torch.rand(everywhere.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask &= everywhere != 0
    model, plain = tiny_model(), tiny_model()
    document, blocks = ours(model, document_mask=mask)
    torch.testing.assert_close(document, everywhere * mask, rtol=0, atol=1e-13)
    torch.testing.assert_close(blocks, ours(plain).blocks, rtol=0, atol=1e-13)
    assert_same_gradients(
        gradients(model, document, blocks),
        gradients(plain, ours(plain).document * mask, blocks=ours(plain).blocks),
        2e-6,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wanted", ["documents", "nothing"])
def test_no_block_at_all(tied, wanted):
    """Documents too short for a block still give their log-probs; every parameter takes part in the backward."""
    model, plain = (tiny_model("qwen2", tie_word_embeddings=tied) for _ in range(2))
    doc_ids = doc_ids_of([[4], [3, 2]], 6)
    layout = BlockLayout.from_documents(doc_ids, stride=4, context_length=3, completion_length=4)
    assert layout.num_blocks == 0
    ids = INPUT_IDS[:2, :6]
    mask = torch.zeros(2, 5, dtype=torch.bool) if wanted == "nothing" else None
    document, blocks = document_and_block_log_probs(
        model, ids, torch.zeros(2, 0, 3, 4, dtype=torch.long), layout, document_mask=mask
    )
    assert blocks.shape == (2, 0, 3, 4)
    found = gradients(model, document, blocks)  # raises if a parameter is not in the graph
    if wanted == "nothing":
        assert (document == 0).all() and all((g == 0).all() for g in found.values())
    else:
        expected = oracles.document_log_probs(plain, ids, doc_ids)
        torch.testing.assert_close(document, expected, rtol=0, atol=1e-12)
        assert_same_gradients(found, gradients(plain, expected, blocks), 2e-6)


def test_one_token_blocks():
    doc_ids = doc_ids_of([[9], [4, 5]])
    layout = BlockLayout.from_documents(doc_ids, stride=2, context_length=2, completion_length=1)
    ids, tokens = INPUT_IDS[:2, :9], random_tokens(layout, 2, 3)
    expected = oracles.block_log_probs(tiny_model(), ids, tokens, layout)
    torch.testing.assert_close(block_log_probs(tiny_model(), ids, tokens, layout), expected, rtol=0, atol=1e-12)


def lora_model(seed: int = 5, **options):
    """A peft model whose adapters matter: B is random instead of zero."""
    config = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM") | options
    model = get_peft_model(tiny_model(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_adapters():
    model = lora_model()
    merged = copy.deepcopy(model).merge_and_unload()
    expected = oracles.block_log_probs(merged, INPUT_IDS, TOKENS, LAYOUT, TEMPERATURE)
    assert (expected - oracles.block_log_probs(tiny_model(), INPUT_IDS, TOKENS, LAYOUT, TEMPERATURE)).abs().max() > 0.5
    document, blocks = ours(model)
    torch.testing.assert_close(blocks, expected, rtol=0, atol=1e-6)  # adapters are float32
    found = gradients(model, document, blocks)
    assert len(found) == 2 * 3 * 4 and all("lora" in name and g.abs().max() > 0 for name, g in found.items())


@pytest.mark.parametrize("make", [tiny_model, lora_model])
def test_wrapped_model_is_called_once(make):
    plain, inner = make(), make()
    install(inner)
    wrapper = Wrapper(inner)
    assert causal_lm(wrapper) is causal_lm(inner)
    expected, result = ours(plain), ours(wrapper)
    assert wrapper.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert_same_gradients(gradients(inner, *result), gradients(plain, *expected), 0.0)


def test_copy_of_an_installed_model_has_its_own_weights():
    """The frozen initial policy is a copy; the taught forward must not lead back to the original."""
    model = tiny_model()
    expected = [x.detach() for x in ours(model)]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(ours(other), expected, strict=True))


def test_unpickled_model_is_taught_again():
    model = tiny_model()
    expected = ours(model)
    loaded = pickle.loads(pickle.dumps(model))
    rollouts = [sample_rollouts(m, INPUT_IDS, LAYOUT, 2, uniforms=UNIFORMS) for m in (model, loaded)]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    assert all(torch.equal(a, b) for a, b in zip(ours(loaded), expected, strict=True))


def test_decoder_keeps_a_forward_of_its_own():
    """Accelerate's hooks (offloading, dispatch over devices) sit there."""
    model = tiny_model()
    add_hook_to_module(model.model, ModelHook())
    forward = vars(model.model)["forward"]
    assert all(torch.equal(a, b) for a, b in zip(ours(model), ours(tiny_model()), strict=True))
    assert vars(model.model).get("forward") is forward
