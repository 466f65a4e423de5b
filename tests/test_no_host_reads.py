"""No stage reads a number back from the device: all of it runs on one that has no numbers (meta), where that raises.

One read is left, once per micro-batch of the trainer and not run here: which of packed documents' blocks have no
weight (`document_and_block_loss`). This also takes the attention of accelerators, through the whole of a model, as far
as shapes and devices go.
"""

import pytest
import torch

from ebft import advantages, attention, rewards
from ebft.attention import BlockPlan
from ebft.blocks import BlockLayout
from ebft.features import FeatureNetwork
from ebft.kernels import KERNELS, Kernel, kernel_gram, ngram_gram
from ebft.logprobs import LogProbs, document_and_block_log_probs, document_and_block_loss
from ebft.rollout import sample_and_sum, sample_rollouts
from ragged import doc_ids_of
from tiny_models import tiny_model

META = torch.device("meta")
LAYOUT = BlockLayout(length=22, stride=3, context_length=2, completion_length=4)
PACKED = BlockLayout.from_documents(doc_ids_of([[22], [9, 10]]), stride=3, context_length=2, completion_length=4)
N = 3


@pytest.fixture
def model():
    return tiny_model("qwen2", dtype=torch.float32).to(META)


@pytest.fixture
def documents():
    return torch.zeros(2, 22, dtype=torch.long, device=META)


def weights_of(rollouts) -> LogProbs:
    return LogProbs(torch.ones(2, 21, device=META), torch.ones(rollouts.tokens.shape, device=META))


def test_reading_back_raises():
    for read in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(torch.zeros((), device=META))


@pytest.mark.parametrize("whitening", ["none", "paper", "released"])
@pytest.mark.parametrize("support", [dict(temperature=0.6), dict(top_k=5), dict(top_p=0.9)], ids=str)
def test_two_forwards(model, documents, support, whitening):
    rollouts = sample_rollouts(model, documents, LAYOUT, N, **support)
    features = FeatureNetwork(model)(documents, rollouts.tokens, LAYOUT)
    worth = advantages.leave_one_out(rewards.feature_matching_rewards(*features, whitening=whitening))
    assert worth.device == META and worth.shape == (2, LAYOUT.num_blocks, N)
    loss, log_probs = document_and_block_loss(
        model, documents, rollouts.tokens, LAYOUT, weights_of(rollouts), **support
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())
    assert log_probs.blocks.shape == rollouts.tokens.shape
    document_and_block_log_probs(model, documents, rollouts.tokens, LAYOUT, **support).blocks.sum().backward()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "linear"])
def test_kernels(model, documents, name):
    frequencies = torch.zeros(96, 8, dtype=torch.float64, device=META)
    kernel = Kernel(name, bandwidths=(1.0, 2.0), frequencies=frequencies, sizes=(1, 2))
    tokens = torch.zeros(2, LAYOUT.num_blocks, N, 4, dtype=torch.long, device=META)
    gram = kernel_gram(*FeatureNetwork(model)(documents, tokens, LAYOUT), kernel) if name != "ngram" else None
    gram = gram or ngram_gram(tokens, LAYOUT.references(documents), kernel.sizes)
    worth = advantages.leave_one_out(rewards.rewards_from_gram(gram, whitening="none"))
    assert worth.device == META and worth.shape == (2, LAYOUT.num_blocks, N)


@pytest.mark.parametrize("layout", [LAYOUT, PACKED], ids=["regular", "packed"])
def test_one_forward(model, documents, layout):
    loss, _, rollouts = sample_and_sum(model, documents, layout, N, weights_of, temperature=0.6)
    loss.backward()
    assert rollouts.tokens.shape == (2, layout.num_blocks, N, 4)
    assert all(p.grad is not None for p in model.parameters())
    FeatureNetwork(model)(documents, rollouts.tokens, layout)


def test_larger_pieces_on_an_accelerator():
    pieces = [len(BlockPlan(LAYOUT, 2, 40, range(4), device=device).chunks) for device in ("cpu", META)]
    rollouts = LAYOUT.num_blocks * 40
    expected = [attention.KEYS_PER_CHUNK_ON_CPU, attention.KEYS_PER_CHUNK]
    assert pieces == [-(-rollouts // (keys // 4)) for keys in expected]
