"""Steps of TRL's trainers with the reward, recorded; as a script, run by torch.distributed.run in two processes."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from trl import GRPOTrainer, RLOOTrainer

from ebft.integrations.trl import FeatureMatchingReward
from trl_setup import grpo_config, rloo_config, word_model, word_tokenizer

ROWS = [
    {"prompt": "a b", "reference": "c a"},
    {"prompt": "d e c a", "reference": "b"},
    {"prompt": "c", "reference": "a a b c d"},  # longer than a completion may be
    {"prompt": "e e a", "reference": ""},
]
CONFIGS = {"rloo": (RLOOTrainer, rloo_config), "grpo": (GRPOTrainer, grpo_config)}
# One optimiser step over all rows, by plain SGD without clipping, that minimises what the docs say.
STEP: dict[str, Any] = dict(
    per_device_train_batch_size=12,
    max_steps=1,
    optim="sgd",
    learning_rate=0.1,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    logging_steps=1,
)


def run(kind: str, folder: Path, rows=ROWS, model=None, tokenizer=None, **settings) -> dict[str, Any]:
    """Train a model of words or another; what was seen and what became of it.

    Returns:
        `seen`: prompt's tokens, completion's and advantage of each row of this process's forwards; `logs`; the weights
        `before` and `after`.
    """
    trainer_class, config = CONFIGS[kind]
    seen = []

    class Recorded(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for row, advantage in enumerate(inputs["advantages"].tolist()):
                parts = (
                    (inputs[f"{name}_ids"][row], inputs[f"{name}_mask"][row]) for name in ("prompt", "completion")
                )
                seen.append((*(ids[mask.bool()].tolist() for ids, mask in parts), advantage))
            return super().compute_loss(model, inputs, *args, **kwargs)

    loss_type = {"loss_type": "dr_grpo"} if kind == "grpo" else {}
    args = config(folder, **(STEP | loss_type | settings))
    phi = model or word_model(seed=1)
    model, tokenizer = model or word_model(dtype=torch.float32), tokenizer or word_tokenizer()
    before = copy.deepcopy(model.state_dict())
    trainer = Recorded(
        model=model,
        reward_funcs=FeatureMatchingReward(phi, args, tokenizer, whitening="none"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return {"seen": seen, "logs": trainer.state.log_history, "before": before, "after": model.state_dict()}


def main(folder: Path) -> None:
    """A step of each trainer, half of its groups in each process; and a batch that splits groups between the two."""
    for kind in CONFIGS:
        torch.save(run(kind, folder, per_device_train_batch_size=6), folder / f"{kind}_{dist.get_rank()}.pt")
    try:
        run("rloo", folder, per_device_train_batch_size=2, num_generations=4, steps_per_generation=1)
    except ValueError as error:
        (folder / f"error_{dist.get_rank()}.json").write_text(json.dumps(str(error)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
