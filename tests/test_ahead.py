"""Sampling for several micro-batches at once gives each the rollouts it would have been given by itself."""

import pytest
import torch

from ebft import EBFTConfig, EBFTTrainer
from ebft.ahead import SamplingAhead, joined, split
from ebft.layouts import batch_layout
from ebft.noise import sampling_uniforms
from ebft.rollout import Rollouts, sample_rollouts
from tiny_models import tiny_model
from training import Weights, config, documents, small_model, trainer

LENGTHS = [30, 17, 40, 12, 25, 33]


@pytest.fixture
def batches(tmp_path):
    """Micro-batches of two rows of different lengths and numbers of blocks."""
    run = trainer(small_model(), documents(LENGTHS), tmp_path, settings=dict(per_device_train_batch_size=2))
    found = list(run.get_train_dataloader())
    for batch in found:
        batch["layout"] = batch_layout(batch, run.args, run.anchors, 0)
    assert len({batch["input_ids"].shape for batch in found}) == 3
    assert len({batch["layout"].num_blocks for batch in found}) == 3
    return found


def sampler(calls: list):
    model = tiny_model("qwen2", vocab_size=300)

    def sample(batch) -> Rollouts:
        calls.append(len(batch["input_ids"]))
        options = dict(seed=0, purpose=1, step=3)
        uniforms = sampling_uniforms(batch["layout"], batch["document_ids"], 3, **options)
        return sample_rollouts(model, batch["input_ids"], batch["layout"], 3, uniforms=uniforms)

    return sample


@pytest.mark.parametrize(("rows", "expected"), [(1, [2, 2, 2]), (2, [2, 2, 2]), (5, [4, 2]), (6, [6]), (99, [6])])
def test_rollouts_are_each_micro_batchs_own(batches, rows, expected):
    calls: list[int] = []
    ahead = SamplingAhead(sampler(calls), rows)
    ahead.begin_step(batches)
    # On its way to the device a batch becomes another dict around the same layout.
    found = [ahead.rollouts(dict(batch)) for batch in batches]
    assert calls == expected
    alone = sampler([])
    for batch, mine in zip(batches, found, strict=True):
        theirs = alone(batch)
        valid = batch["layout"].valid
        assert torch.equal(mine.tokens, theirs.tokens)
        for a, b in zip(mine[1:3], theirs[1:3], strict=True):
            torch.testing.assert_close(a[valid], b[valid])


def test_what_is_not_of_the_step_is_sampled_by_itself(batches):
    calls: list[int] = []
    ahead = SamplingAhead(sampler(calls), 99)
    ahead.begin_step(batches[:2])
    ahead.rollouts(batches[2])
    assert calls == [2]
    ahead.begin_step(batches[:2])
    ahead.rollouts(batches[0])
    ahead.begin_step(batches[1:])
    ahead.rollouts(batches[1])
    assert calls == [2, 4, 4], "nothing of an earlier step is handed out"


def test_micro_batches_that_are_too_unequal_stay_apart(tmp_path):
    """The third would have the blocks of its one long row padded to four rows more."""
    lengths = [12, 13, 12, 13, 40, 40, 12, 13]
    run = trainer(small_model(), documents(lengths), tmp_path, settings=dict(per_device_train_batch_size=2))
    found = list(run.get_train_dataloader())
    for batch in found:
        batch["layout"] = batch_layout(batch, run.args, run.anchors, 0)
    calls: list[int] = []
    ahead = SamplingAhead(sampler(calls), 99)
    ahead.begin_step(found)
    for batch in found:
        ahead.rollouts(batch)
    assert calls == [4, 2, 2]


def test_split_undoes_joined(batches):
    merged = joined(batches)
    shape = (*merged["layout"].anchors.shape, 2, 4)
    numbers = Rollouts(*torch.arange(3.0 * torch.Size(shape).numel()).view(3, *shape))
    row = 0
    for batch, part in zip(batches, split(numbers, batches), strict=True):
        B, K = batch["layout"].anchors.shape
        assert torch.equal(part.tokens, numbers.tokens[row : row + B, :K])
        row += B


@pytest.mark.parametrize("packing", [False, True])
def test_training_is_the_same(tmp_path, packing):
    """Whole runs, weights after every step: each micro-batch sampled by itself, and a whole step's at once."""
    found = []
    for documents_at_once in (None, 2, 6):
        settings = dict(
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            reuse_sampling_forward=False,
            per_device_generation_batch_size=documents_at_once,
            packing=packing,
            num_train_epochs=4,
        )
        weights = Weights()
        rows, folder = documents(LENGTHS * 3), tmp_path / str(documents_at_once)
        run = trainer(small_model(), rows, folder, settings=settings, callbacks=[weights])
        calls = []
        ours = run.sample
        run.sample = lambda batch, ours=ours, calls=calls: calls.append(len(batch["input_ids"])) or ours(batch)
        run.train()
        found.append((calls, weights.history))
    (calls, expected), *others = found
    assert set(calls) <= {1, 2}
    assert set(others[-1][0]) <= {5, 6} and len(others[-1][0]) == 2
    for _, history in others:
        for a, b in zip(history, expected, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)


def test_a_sample_of_ones_own_is_given_micro_batches(tmp_path):
    calls = []

    class Counted(EBFTTrainer):
        def sample(self, inputs, **keywords):
            calls.append(set(inputs))
            return super().sample(inputs, **keywords)

    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, per_device_generation_batch_size=6)
    trainer(small_model(), documents(LENGTHS), tmp_path, trainer_class=Counted, settings=settings).train()
    assert len(calls) == 3
    assert all("labels" in keys for keys in calls)


def test_rows_at_a_time(tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert config(tmp_path, **sizes).rows_sampled_on(cpu) == 4
    assert config(tmp_path, **sizes).rows_sampled_on(gpu) == 16
    assert config(tmp_path, **sizes | dict(gradient_accumulation_steps=2)).rows_sampled_on(gpu) == 8, "one step's"
    assert config(tmp_path, **sizes, per_device_generation_batch_size=1).rows_sampled_on(gpu) == 4
    assert config(tmp_path, **sizes, per_device_generation_batch_size=12).rows_sampled_on(cpu) == 12
    with pytest.raises(ValueError, match="per_device_generation_batch_size=0 must be at least 1"):
        EBFTConfig(str(tmp_path), per_device_generation_batch_size=0)
