"""Two gloo processes do what one does: weights, metrics, rollouts; and they stop together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import two_processes
from training import read_metrics, read_rollouts, relative_error

SCRIPT = Path(two_processes.__file__)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", two_processes.CASES)
def test_two_processes_equal_one(together, tmp_path, case):
    alone = two_processes.run(case, tmp_path, processes=1)
    weights = torch.load(together / f"{case}.pt")
    assert len(weights) == len(alone.weights) == 3
    for step in (1, 2):
        assert relative_error(alone.weights[0], weights[step], alone.weights[step]) < 1e-5
        ours, theirs = read_rollouts(together / case, step), read_rollouts(tmp_path, step)
        assert ours and ours.keys() == theirs.keys()
        for group, rows in theirs.items():
            assert [row["token_ids"] for row in ours[group]] == [row["token_ids"] for row in rows]
            assert [row["advantage"] for row in ours[group]] == pytest.approx([row["advantage"] for row in rows])
    assert len(read_metrics(together / case)) == len(alone.metrics)
    for one, two in zip(alone.metrics, read_metrics(together / case), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_both_stop_before_the_step_that_is_not_finite(together):
    for rank in (0, 1):
        assert (together / f"error_{rank}.txt").read_text().startswith("Step 2 has loss")
        saved = load_file(together / "poisoned" / "nonfinite_step_000002" / f"rank_{rank}.safetensors")
        assert {"0.input_ids", "1.input_ids", "0.tokens"} <= saved.keys()
        assert saved["0.rewards"].isnan().any() == (rank == 1)
