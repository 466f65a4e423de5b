"""A run of six steps with checkpoints; as a script, one that kills itself on the way."""

import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from training import documents, small_model, train

# Everything that could be carried from step to step: shuffling over two epochs, AdamW's moments, schedules, random
# blocks, evaluation in between, a last step of an epoch with fewer micro-batches.
ROWS = documents([23, 17, 5, 30, 26, 12, 9, 21, 6, 14])
SETTINGS = dict(
    max_steps=6,
    save_strategy="steps",
    save_steps=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    train_sampling_strategy="random",
    optim="adamw_torch",
    learning_rate=1e-2,
    lr_scheduler_type="linear",
    rl_warmup_steps=2,
    ce_decay="linear",
    eval_strategy="steps",
    eval_steps=1,
)
KINDS = {
    "full": dict(max_blocks=2, random_anchor_offset=True, beta=0.1),
    "kernel": dict(kernel="characteristic", kernel_frequencies=16, eval_steps=3),
    "rbf": dict(kernel="rbf", eval_strategy="no"),
    "ngram": dict(kernel="ngram", eval_strategy="no"),
    "lora": dict(packing=True, per_device_train_batch_size=1, logging_steps=2, rollout_save_steps=3),
}
MOMENTS = ("on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save")


class Kill(TrainerCallback):
    """Ends the process, with no chance to clean up, at a moment of a step."""

    def __init__(self, step: int, moment: str):
        def die(args, state, control, **kwargs):
            if state.global_step >= step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, moment, die)


def run(kind: str, folder: Path, resume=None, callbacks=(), **settings):
    keywords = {}
    if kind == "lora":
        torch.manual_seed(5)
        keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    settings = SETTINGS | KINDS[kind] | settings
    if settings["eval_strategy"] != "no":
        keywords["eval_dataset"] = Dataset.from_list(documents([9, 22, 5], seed=7))
    model = small_model(dtype=torch.float32, scale=8.0)
    return train(model, ROWS, folder, resume, settings=settings, callbacks=list(callbacks), **keywords)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), callbacks=[Kill(int(sys.argv[3]), sys.argv[4])])
