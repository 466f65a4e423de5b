"""The plan's cut attention against dense attention under the definition's mask; ordinary forwards stay the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssConfig, GptOssForCausalLM

import oracles
from ebft import attention
from ebft import merged as merged_attention_module
from ebft.attention import BlockPlan, attend, block_attention, enable_block_attention
from ebft.blocks import BlockLayout
from ebft.forward import install
from ebft.logprobs import block_log_probs
from ragged import PROPERTY, layouts, ragged_batch, random_tokens
from tiny_models import tiny_model

DIM = 4


def states(layout: BlockLayout, batch_size: int, n: int, seed: int = 0):
    """Random query [B, 4, T, d], key and value [B, 2, T, d] with gradient, and where a token is real: [B, T]."""
    T = layout.length + layout.num_blocks * n * layout.completion_length
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch_size, heads, T, DIM) for heads in (4, 2, 2)]
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    docs = torch.zeros(batch_size, layout.length) if layout.doc_ids is None else layout.doc_ids
    blocks = layout.expand(batch_size)[1].repeat_interleave(n * layout.completion_length, 1)
    return tensors, torch.cat([docs >= 0, blocks], 1)


def dense(tensors, layout: BlockLayout, n: int, window=None, **options):
    B = len(tensors[0])
    mask, position = layout.attention_mask(n), layout.position_ids(n).expand(B, -1)
    if window is not None:
        mask = mask & (position[:, :, None] - position[:, None, :] < window)
    return oracles.attention(*tensors, mask.expand(B, -1, -1), **options)


def packed(tensors, layout: BlockLayout, n: int, window=None, **options):
    plan = BlockPlan(layout, len(tensors[0]), n if layout.num_blocks else 0, range(layout.completion_length))
    return attend(*tensors, plan, window=window, **options)


def decoded(tensors, layout: BlockLayout, n: int, window=None, **options):
    """The same, first the document and then a step at a time from a cache in (step, block, rollout) order."""
    B, P, G = len(tensors[0]), layout.length, layout.completion_length
    _, key, value = tensors
    parts = [attend(*(x[:, :, :P] for x in tensors), BlockPlan(layout, B, 0, range(0)), window=window, **options)]
    by_step = [x[:, :, P:].unflatten(2, (-1, G)).transpose(2, 3) for x in tensors]  # [B, heads, G, R, d]
    steps = []
    for t in range(G if layout.num_blocks else 0):
        plan = BlockPlan(layout, B, n, range(t, t + 1), decoding=True)
        own, document = (x[:, :, : t + 1].flatten(2, 3) for x in by_step[1:]), (key[:, :, :P], value[:, :, :P])
        steps.append(attend(by_step[0][:, :, t], *own, plan, document, window=window, **options))
    if steps:
        parts.append(torch.stack(steps, 3).flatten(2, 3))
    return torch.cat(parts, 2)


options = st.fixed_dictionaries(
    {
        "window": st.none() | st.integers(1, 9),
        "softcap": st.none() | st.just(2.0),
        "scaling": st.none() | st.just(0.9),
    }
)


@PROPERTY
@given(layout=layouts(), n=st.integers(1, 3), size=st.sampled_from([1, 6, 128]), options=options)
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "chunks"])
@pytest.mark.parametrize("ours", [packed, decoded])
def test_cut_attention_is_dense_attention(ours, merged, layout, n, size, options):
    tensors, real = states(layout, len(layout.doc_ids), n)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)) * real[:, None, :, None]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KEYS_PER_CHUNK_ON_CPU", size)
        patch.setattr(merged_attention_module, "QUERIES_PER_CHUNK", size)
        if not merged:  # what another device, or a softcap, would take
            patch.setattr(attention, "_can_merge", lambda *args: False)
        for function in (ours, dense):
            out = function(tensors, layout, n, **options)
            results.append([out * (weights != 0), *torch.autograd.grad((out * weights).sum(), tensors)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 if options["softcap"] else 1e-12)


@pytest.mark.parametrize("ours", [packed, decoded])
def test_blocks_at_the_same_place_of_documents_that_begin_elsewhere(ours):
    """Anchors that are equal in all rows do not make one mask of them: here the prefixes begin at 0 and at 6."""
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, 8] = True
    doc_ids = torch.tensor([[0] * 12, [0] * 6 + [1] * 6])
    sizes = dict(stride=4, context_length=2, completion_length=3)
    layout = BlockLayout.from_documents(doc_ids, starts=starts, **sizes)
    assert layout.anchors.tolist() == [[8], [8]]
    tensors, _ = states(layout, 2, 3)
    torch.testing.assert_close(ours(tensors, layout, 3), dense(tensors, layout, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ours", [packed, decoded])
def test_regular_layout(ours):
    layout = BlockLayout(length=13, stride=2, context_length=3, completion_length=4)
    tensors, _ = states(layout, 2, 3)
    torch.testing.assert_close(ours(tensors, layout, 3), dense(tensors, layout, 3), rtol=0, atol=1e-12)
    assert BlockPlan(layout, 2, 3, range(4)).document_mask(None) is None, "causal order needs no mask"


@pytest.mark.parametrize("ours", [packed, decoded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4])
def test_precision_of_merged_attention(ours, dtype, size):
    """Against float64: within a few roundings of the type, values and gradients, relative to the largest."""
    _, layout = ragged_batch()
    tensors, real = states(layout, 3, 2)
    tensors[:2] = [size * x for x in tensors[:2]]  # query and key, for scores that are larger and round more
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)) * real[:, None, :, None]
    results = []
    for function, kind in ((ours, dtype), (dense, torch.float64)):
        rounded = [x.detach().to(dtype).to(kind).requires_grad_() for x in tensors]
        out = function(rounded, layout, 2)
        results.append([out * (weights != 0), *torch.autograd.grad((out * weights.to(kind)).sum(), rounded)])
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - expected).abs().max() / expected.abs().max()
        # Scores are sums in float32, whose rounding grows with them.
        assert error < 4 * max(size * torch.finfo(dtype).eps, size**2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("wrong", ["anchors", "prefix_starts", "doc_ids"])
def test_wrong_layout_shows(wrong):
    _, layout = ragged_batch()
    tensors, real = states(layout, 3, 2)
    changed = layout.doc_ids.clamp(max=0) if wrong == "doc_ids" else getattr(layout, wrong) + 1
    difference = packed(tensors, replace(layout, **{wrong: changed}), 2) - dense(tensors, layout, 2)
    assert (difference * real[:, None, :, None]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(f, i) for f in ("qwen2", "mistral_window", "gpt2") for i in ("sdpa", "eager")] + [("gemma2", "eager")],
)
def test_ordinary_forward_stays_the_same(family, implementation):
    model = tiny_model(family, dtype=torch.float32, attention=implementation)
    ids, _ = ragged_batch()
    padding = torch.ones_like(ids)
    padding[0, :5] = 0  # on the left, as for generate
    options = dict(attention_mask=padding, max_new_tokens=4, do_sample=False, pad_token_id=0)

    def run():
        generated = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
        with torch.no_grad():
            logits = [model(ids).logits, model(ids, attention_mask=padding).logits]
        return [*logits, generated.sequences, *generated.logits]

    before = run()
    install(model)
    assert model.config._attn_implementation == f"ebft_{implementation}"
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


def test_flash_attention_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*attn_implementation='sdpa'"):
        enable_block_attention(model)


def test_context_manager_restores():
    model = tiny_model()
    with block_attention(model):
        assert model.config._attn_implementation == "ebft_sdpa"
        with block_attention(model):
            pass
        assert model.config._attn_implementation == "ebft_sdpa"
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), block_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_attention_sinks_are_refused(monkeypatch):
    """By the attention itself, should such a model ever get there: by its family it is run in plain rows."""
    monkeypatch.setattr("ebft.forward.packs", lambda model: True)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)
    config = GptOssConfig(**sizes, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    config._attn_implementation = "eager"
    ids, layout = ragged_batch()
    with pytest.raises(ValueError, match="GptOssAttention.*s_aux"):
        block_log_probs(GptOssForCausalLM(config), ids, random_tokens(layout, 3, 2), layout)
