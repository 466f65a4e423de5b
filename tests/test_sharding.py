"""What FSDP2 needs of us, in one process: layouts in step, layers gathered for a rollout, and the memory it holds."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.fsdp2_on_cpu import FSDP2Trainer
from ebft import BlockLayout
from ebft.features import layer_list
from ebft.measuring import peak_memory
from ebft.rollout import sample_blocks
from ebft.sharding import agreed, gathered, shard, whole
from ebft.sizes import run_footprint, survey
from ragged import doc_ids_of
from test_plan_memory import MODEL, SETTINGS, WIDE
from tiny_models import tiny_model
from training import documents, small_model, train, trainer


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layouts(*lengths: int) -> list[BlockLayout]:
    sizes = dict(stride=4, context_length=4, completion_length=4)
    return [BlockLayout.from_documents(doc_ids_of([[n]]), **sizes) for n in lengths]


def test_a_micro_batch_has_a_block_on_all_processes_or_on_none():
    mine = layouts(12, 5, 5)
    others = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    found = agreed(mine, lambda there: there + others)
    assert [layout.num_blocks for layout in mine] == [2, 0, 0]
    assert [layout.num_blocks for layout in found] == [2, 1, 0]
    assert found[0] is mine[0] and not found[1].valid.any()


def test_an_absent_block_is_sampled_and_comes_to_nothing():
    (layout,) = layouts(5)
    absent, ids = layout.with_absent_block(), torch.randint(3, 61, (1, 5))
    tokens = sample_blocks(tiny_model("qwen2"), ids, absent, 3)
    assert tokens.shape == (1, 1, 3, 4) and not tokens.any()
    assert (absent.references(ids) == -100).all()


def test_layers_stay_gathered_for_a_rollout(process_group):
    model = tiny_model("qwen2")
    layers = layer_list(model.base_model)[1]
    shard(layers, model)

    def sharded() -> set[bool]:
        return {isinstance(weight, DTensor) for layer in layers for weight in layer.parameters()}

    ids = torch.randint(3, 61, (1, 8))
    for keep in (False, True, False):
        with gathered(model, keep), torch.no_grad():
            model(ids)
            assert sharded() == {not keep}
        assert sharded() == {True}
    assert not isinstance(whole(layers[0].mlp.up_proj.weight), DTensor)


def test_plan_is_what_a_sharded_run_holds(tmp_path, process_group):
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(Qwen2Config(**MODEL | WIDE), dtype=torch.float32)
    settings = SETTINGS | dict(per_device_train_batch_size=1)
    ours = trainer(policy, documents([96] * 4), tmp_path, FSDP2Trainer, settings)
    run = run_footprint(ours.args, ours.model, ours.feature_network, None, engine="fsdp2")
    row = survey(ours.train_dataset, ours.args, ours.anchors).largest_row
    memory = run.memory(row, 1)
    there_before = memory["weights"] + memory["feature network"]
    peak = peak_memory(ours.train, torch.device("cpu"))
    assert memory["total"] == pytest.approx(peak + there_before, rel=0.08), memory


class Watched(FSDP2Trainer):
    """Remembers the log-probs of its rollouts, and the types inside and outside of a layer."""

    def compute_rewards(self, inputs, rollouts):
        self.log_probs = rollouts.log_probs
        return super().compute_rewards(inputs, rollouts)

    def train(self, *args, **kwargs):
        layer, self.inside = layer_list(self.model.base_model)[1][0], set()
        layer.mlp.register_forward_hook(lambda module, args, output: self.inside.add(output.dtype))
        return super().train(*args, **kwargs)


def test_bfloat16_is_inside_and_float32_outside(tmp_path, process_group):
    runs = {}
    for bf16 in (False, True):
        model, settings = small_model(dtype=torch.float32), dict(max_steps=2, learning_rate=1e-3, bf16=bf16)
        rows = documents([23, 17, 30])
        runs[bf16] = train(model, rows, tmp_path / str(bf16), settings=settings, trainer_class=Watched)
    ours = runs[True].trainer
    assert ours.inside == {torch.bfloat16}
    assert {weight.dtype for weight in ours.model.state_dict().values()} == {torch.float32}
    assert {state.dtype for state in ours.feature_network.model.state_dict().values()} == {torch.bfloat16}
    assert ours.log_probs.dtype == torch.float32
    assert not torch.equal(ours.log_probs, ours.log_probs.bfloat16().float())
    exact, rounded = (runs[bf16].metrics[1]["ce_loss"] for bf16 in (False, True))
    assert rounded != exact and rounded == pytest.approx(exact, rel=1e-2)
    before, after = runs[True].weights[0], runs[True].weights[-1]
    assert any((after[name] != after[name].bfloat16().float()).any() for name in before), "masters are not rounded"
