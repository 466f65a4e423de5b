"""On a GPU, where there is one: the attention kernels of accelerators, and a whole step, against the CPU's."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import test_attention
from ebft import flex
from ebft.attention import BlockPlan, attend
from ebft.blocks import BlockLayout
from ebft.features import FeatureNetwork
from ebft.kernels import Kernel, kernel_gram, median_distance, ngram_gram
from ebft.liger import take_liger_kernels
from ebft.logprobs import LogProbs, document_and_block_loss
from ebft.noise import random_frequencies
from ebft.rollout import sample_blocks, sample_rollouts
from ragged import doc_ids_of, ragged_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
N = 3
KINDS = ["sdpa", "eager"]  # on a GPU the first takes flex attention, the second does not


SHAPES = ["regular", "ragged", "short"]  # the last has fewer queries than flex attention is given


def documents_and_blocks(shape: str):
    """`input_ids` [B, P] and their layout."""
    if shape == "short":
        return ragged_batch()
    sizes = dict(stride=6, context_length=3, completion_length=4)
    layout = BlockLayout(300, **sizes)
    if shape == "ragged":
        layout = BlockLayout.from_documents(doc_ids_of([[270], [150, 140], [300]]), **sizes)
    assert layout.num_blocks * N >= flex.FEWEST_QUERIES
    rows = 3 if shape == "ragged" else 2
    return torch.randint(3, 61, (rows, 300), generator=torch.Generator().manual_seed(1)), layout


def on_gpu(function, tensors, layout, **options):
    """`test_attention.packed` or `decoded`, with plans and tensors on the GPU."""

    class Plan(BlockPlan):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, device="cuda")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_attention, "BlockPlan", Plan)
        patch.setattr(test_attention, "attend", attend)
        return function(tensors, layout, N, **options)


@pytest.mark.parametrize("name", ["rbf", "energy", "characteristic"])
def test_kernels_are_the_cpus(name):
    generator = torch.Generator().manual_seed(0)
    gen, ref = (torch.randn(*shape, 96, generator=generator) for shape in ((7, 5, 4), (7, 5)))
    gen[:, :, 2], ref[:, 1], gen[3, 4, 1, 0] = gen[:, :, 0], gen[:, 1, 0], torch.nan
    kernel = Kernel(name, (5.0, 20.0), random_frequencies(96, 32, (5.0,), seed=0))
    there = kernel_gram(gen.cuda(), ref.cuda(), kernel)
    for one, other in zip(there, kernel_gram(gen, ref, kernel), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-12, equal_nan=True)
    if name != "characteristic":
        assert (there.cross[:, 1, 0] == (0 if name == "energy" else 1)).all(), "of equal features"
    torch.testing.assert_close(median_distance(gen[0].cuda()).cpu(), median_distance(gen[0]))


def test_ngrams_are_the_cpus():
    tokens = torch.randint(0, 3, (7, 5, 4, 6), generator=torch.Generator().manual_seed(0))
    there, here = (
        ngram_gram(tokens.cuda(), tokens[:, :, 0].cuda(), (1, 3)),
        ngram_gram(tokens, tokens[:, :, 0], (1, 3)),
    )
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}], ids=lambda x: "".join(x))
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_dense_attention(monkeypatch, kind, dtype, options, shape):
    """Values and gradients within a few roundings of the type, relative to the largest."""
    monkeypatch.setattr(test_attention, "DIM", 16)
    ids, layout = documents_and_blocks(shape)
    rows = len(ids)
    tensors, real = test_attention.states(layout, rows, N)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)) * real[:, None, :, None]
    rounded = [x.detach().to(dtype).double().requires_grad_() for x in tensors]
    out = test_attention.dense(rounded, layout, N, **options)
    expected = [out * (weights != 0), *torch.autograd.grad((out * weights).sum(), rounded)]
    for function in (test_attention.packed, test_attention.decoded):
        there = [x.detach().to("cuda", dtype).requires_grad_() for x in tensors]
        mine = on_gpu(function, there, layout, compiled=kind == "sdpa", **options)
        slopes = weights.to("cuda", dtype)
        found = [mine * (slopes != 0), *torch.autograd.grad((mine * slopes).sum(), there)]
        for a, b in zip(found, expected, strict=True):
            error = (a.cpu().double() - b).abs().max() / b.abs().max()
            assert error < 16 * torch.finfo(dtype).eps, function.__name__


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    here = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="sdpa")
    found = {"cpu": here.eval()}
    for kind in KINDS:
        there = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=kind)
        there.load_state_dict(here.state_dict())
        found[kind] = there.eval().cuda()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_cpus(models, kind, shape):
    """Tokens, log-probs, features, loss and gradient, in float32."""
    generator = torch.Generator().manual_seed(0)
    ids, layout = documents_and_blocks(shape)
    shape = (len(ids), layout.num_blocks, N, layout.completion_length)
    uniforms = torch.rand(shape, generator=generator)
    slopes = torch.randn(shape, generator=generator), torch.randn(len(ids), ids.shape[1] - 1, generator=generator)
    results = []
    for name in ("cpu", kind):
        model = models[name]
        device = next(model.parameters()).device
        found = sample_rollouts(model, ids.to(device), layout, N, uniforms=uniforms)
        tokens = results[0][0].to(device) if results else found.tokens
        features = FeatureNetwork(model)(ids.to(device), tokens, layout)
        weights = LogProbs(slopes[1].to(device), slopes[0].to(device))
        loss, log_probs = document_and_block_loss(model, ids.to(device), tokens, layout, weights)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        real = layout.expand(len(ids))[1][..., None, None]
        log_probs = [x.cpu() for x in (log_probs.document, log_probs.blocks * real.to(device))]
        results.append([found.tokens.cpu(), *log_probs, *(x.cpu() for x in features), *(x.cpu() for x in gradient)])
    (tokens, *expected), (mine, *found) = results
    # A uniform that falls on the border of two tokens may fall to either side.
    assert (tokens != mine).float().mean() < 0.01
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_under_autocast(models, kind):
    """bfloat16 products: the mean log-prob of what is drawn agrees with float32's within their noise."""
    layout = BlockLayout(200, stride=4, context_length=3, completion_length=4)
    ids = torch.randint(101, (4, 200), generator=torch.Generator().manual_seed(0)).cuda()
    uniforms = torch.rand(4, layout.num_blocks, N, 4, generator=torch.Generator().manual_seed(1))
    exact = sample_rollouts(models[kind], ids, layout, N, uniforms=uniforms)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = sample_rollouts(models[kind], ids, layout, N, uniforms=uniforms)
        tokens = sample_blocks(models[kind], ids, layout, N, uniforms=uniforms)
    assert torch.equal(tokens, rounded.tokens)
    assert (exact.tokens == rounded.tokens).float().mean() > 0.8
    assert abs(exact.log_probs.mean() - rounded.log_probs.mean()) < 0.05


def test_liger_kernels_leave_a_step_what_it_was(models):
    """Its norms, MLPs and rotary embedding round otherwise, and our forward stays."""
    pytest.importorskip("liger_kernel")
    layout = BlockLayout(150, stride=5, context_length=3, completion_length=4)
    generator = torch.Generator().manual_seed(0)
    ids, shape = torch.randint(101, (2, 150), generator=generator).cuda(), (2, layout.num_blocks, N, 4)
    tokens = torch.randint(101, shape, generator=generator).cuda()
    weights = LogProbs(torch.randn(2, 149, generator=generator).cuda(), torch.randn(shape, generator=generator).cuda())
    results = []
    for patched in (False, True):
        model = deepcopy(models["sdpa"])
        if patched:
            take_liger_kernels(model)
        features = FeatureNetwork(model)(ids, tokens, layout)
        loss, log_probs = document_and_block_loss(model, ids, tokens, layout, weights)
        results.append([*log_probs, *features, *torch.autograd.grad(loss, list(model.parameters()))])
    assert "Liger" in repr(model)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_plan_is_what_an_update_holds():
    """Peak memory of an update in bfloat16 against the plan's."""
    from benchmarks.arms import ARMS, Bench, Options
    from benchmarks.shapes import SETTINGS, Workload
    from ebft.footprint import Footprint
    from ebft.measuring import peak_memory
    from ebft.planning import Method
    from ebft.sizes import network_shape, weights_held

    device = torch.device("cuda")
    bench = Bench(Options("Qwen2.5-0.5B", vocab=32768, device=device, dtype=torch.bfloat16), 1024)
    work = Workload(**SETTINGS["qa"], batch=2, micro_batch=2)
    arm = ARMS["ours"](bench, work, keep_gradients=True)
    arm.prepare()
    for stage in arm.stages:
        getattr(arm, stage)()
    peaks = {stage: peak_memory(getattr(arm, stage), device) for stage in arm.stages}
    network = arm.network
    footprint = Footprint(
        weights=weights_held(bench.policy, network, None, None),
        method=Method(4, 8),
        policy=network_shape(bench.policy.base_model),
        feature=network_shape(network.decoder),
        taps=3,
        bf16=True,
        rows_per_chunk=2**27 // 32768,
    )
    planned = footprint.memory(work.work(), 2)
    assert planned["in update"] == pytest.approx(peaks["update"], rel=0.15)
    for stage in ("sampling", "features"):  # smaller, and sampling draws tokens alone here
        assert peaks[stage] < 1.15 * planned[f"in {stage}"], stage
