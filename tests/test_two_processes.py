"""Two gloo processes do what one does, by DDP and by FSDP2; they stop together; others go on with checkpoints."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import two_processes
from training import read_metrics, read_rollouts, relative_error

SCRIPT = Path(two_processes.__file__)
BOTH = [("ddp", case) for case in two_processes.CASES] + [("fsdp2", case) for case in two_processes.SHARDED]
LONG = [(engine, case) for engine in two_processes.ENGINES for case in two_processes.LONG_RUNS]


def launch(processes: int, *words) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join(sys.path)  # with `benchmarks`
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    command = [*launcher, str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(2, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's run of a case."""
    return cache(lambda case: two_processes.run(case, tmp_path_factory.mktemp(case), processes=1))


@pytest.mark.parametrize(("engine", "case"), BOTH)
def test_two_processes_equal_one(together, alone, engine, case):
    within = 1e-3 if "mamba" in case else 1e-5  # which runs in float32
    check_equal(together / engine / case, alone(case), within)


def check_equal(folder: Path, one, within: float) -> None:
    """What two processes left in a folder, of two steps, is what one left."""
    weights = torch.load(folder.with_name(f"{folder.name}_0.pt"))
    assert len(weights) == len(one.weights) == 3
    for step in (1, 2):
        assert relative_error(one.weights[0], weights[step], one.weights[step]) < within
        ours, theirs = read_rollouts(folder, step), read_rollouts(one.folder, step)
        assert ours and ours.keys() == theirs.keys()
        for group, rows in theirs.items():
            assert [row["token_ids"] for row in ours[group]] == [row["token_ids"] for row in rows]
            expected = pytest.approx([row["advantage"] for row in rows], rel=within, abs=within / 100)
            assert [row["advantage"] for row in ours[group]] == expected
    assert len(read_metrics(folder)) == len(one.metrics)
    for mine, two in zip(one.metrics, read_metrics(folder), strict=True):
        assert two == pytest.approx(mine, rel=within, abs=within / 100)


@pytest.mark.parametrize(("engine", "case"), LONG)
def test_ten_steps_leave_equal_weights_everywhere(together, alone, engine, case):
    one, weights = alone(case), [torch.load(together / engine / f"{case}_{rank}.pt")[-1] for rank in (0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert relative_error(one.weights[0], weights[0], one.weights[-1]) < 1e-6
    saved = "adapter_model" if "lora" in case else "model"
    for name, weight in load_file(together / engine / case / f"{saved}.safetensors").items():
        trained = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        assert torch.equal(weight, weights[0][trained])


@pytest.fixture
def process_group():
    """Of this process alone, for FSDP2."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 4])
def test_checkpoints_of_two_processes_go_on_in_others(together, process_group, processes):
    two_processes.resumed(together, 1) if processes == 1 else launch(processes, together, "--resume")
    for engine, case in LONG:
        whole = torch.load(together / engine / f"{case}_0.pt")
        resumed = torch.load(together / f"on_{processes}" / engine / f"{case}.pt")
        assert len(resumed) == 6
        assert relative_error(whole[0], resumed[0], whole[5]) < 1e-12, "weights of the checkpoint"
        assert relative_error(whole[0], resumed[-1], whole[-1]) < 1e-6, "and of the optimiser's state"


@pytest.mark.parametrize(("engine", "other", "so"), [("fsdp2", "ddp", "with"), ("ddp", "fsdp2", "without")])
def test_an_optimisers_state_is_of_its_engine(together, process_group, tmp_path, engine, other, so):
    """Transformers would find no model, or go on with a new optimiser."""
    copy = shutil.copytree(together / engine / "long", tmp_path / "copy")
    trainer_class = two_processes.ENGINES[other]
    with pytest.raises(ValueError, match=f"was written {so} FSDP, .*: go on {so} it, or start a new run"):
        two_processes.run("long", copy, 1, trainer_class=trainer_class, resume=str(copy / "checkpoint-5"))


def test_both_stop_before_the_step_that_is_not_finite(together):
    for rank in (0, 1):
        assert (together / f"error_{rank}.txt").read_text().startswith("Step 2 has loss")
        saved = load_file(together / "poisoned" / "nonfinite_step_000002" / f"rank_{rank}.safetensors")
        assert {"0.input_ids", "1.input_ids", "0.tokens"} <= saved.keys()
        assert saved["0.rewards"].isnan().any() == (rank == 1)
