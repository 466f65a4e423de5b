"""A run of `two_processes` in float32 on the GPUs that `accelerate launch` gives it, and its weights at each step."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from two_processes import run

if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    on_gpus = dict(use_cpu=False, bf16=False, dtype=torch.float32)
    finished = run(case, folder / "run", int(os.environ.get("WORLD_SIZE", 1)), **on_gpus)
    sharded = [isinstance(weight, DTensor) for weight in finished.trainer.model.state_dict().values()]
    assert all(sharded) if finished.trainer.is_fsdp_enabled else not any(sharded)
    if finished.trainer.is_world_process_zero():
        weights = [{name: weight.cpu() for name, weight in step.items()} for step in finished.weights]
        torch.save(weights, folder / "weights.pt")
    finished.trainer.accelerator.end_training()
