"""Training runs for one or two processes; as a script, started by torch.distributed.run, it does them all."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from ebft import EBFTTrainer
from training import documents, small_model, train

# In batches of two, and every second one to the second process: that one has no document with a block.
LOPSIDED = documents([23, 17, 5, 3, 30, 26, 6, 4])
MIXED = documents([23, 5, 17, 30, 6, 12, 3, 26])
PROMPTED = documents([23, 17, 5, 4, 30, 26, 6, 7], prompts=[9, 5, 4, 3, 11, 25, 2, 6])
CASES = {
    "full": dict(rows=LOPSIDED, evaluated=True),
    "no_cross_entropy": dict(rows=LOPSIDED, ce_coef=0.0, gradient_checkpointing=True),
    "lora": dict(rows=LOPSIDED, adapted=True, beta=0.5),
    "answers": dict(rows=PROMPTED, completion_only_loss=True, loss_normalization="document"),
    "packed": dict(rows=documents([20] * 8), packing=True, rows_per_process=1),
    "stream": dict(rows=MIXED, stream=True),
    "rbf": dict(rows=LOPSIDED, kernel="rbf", evaluated=True),
    "fourier_stream": dict(rows=MIXED, kernel="characteristic", kernel_frequencies=16, stream=True),
    "learned": dict(rows=LOPSIDED, feature_network="learned", feature_classifier_learning_rate=0.05, evaluated=True),
    "ngram": dict(rows=LOPSIDED, kernel="ngram", evaluated=True),
}


def run(name: str, folder: Path, processes: int, *, trainer_class=EBFTTrainer):
    """Two steps on all documents each, with plain SGD; the same documents whatever the number of processes."""
    settings = dict(max_steps=2, gradient_accumulation_steps=2) | CASES[name]
    rows = settings.pop("rows")
    rows_per_process = settings.pop("rows_per_process", 2)
    settings["per_device_train_batch_size"] = rows_per_process * 2 // processes
    keywords = {}
    if settings.pop("evaluated", False):
        keywords["eval_dataset"] = Dataset.from_list(documents([9, 22, 5, 14, 6], seed=7))
        settings |= dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    if settings.pop("adapted", False):
        torch.manual_seed(5)
        keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    if settings.pop("stream", False):
        rows = IterableDataset.from_generator(lambda: iter(MIXED))
    model = small_model(scale=8.0)
    return train(model, rows, folder, settings=settings, trainer_class=trainer_class, **keywords)


class SecondRankPoisoned(EBFTTrainer):
    """The rewards of the second process are not numbers, in the second step."""

    def compute_rewards(self, inputs, rollouts):
        gram, rewards = super().compute_rewards(inputs, rollouts)
        if self.args.process_index == 1 and self.state.global_step == 1:
            rewards = rewards._replace(total=rewards.total * torch.nan)
        return gram, rewards


def main(folder: Path) -> None:
    """All cases into `folder`, whose files the test compares with those of one process."""
    for name in CASES:
        finished = run(name, folder / name, processes=2)
        if finished.trainer.is_world_process_zero():
            torch.save(finished.weights, folder / f"{name}.pt")
    try:
        run("packed", folder / "poisoned", processes=2, trainer_class=SecondRankPoisoned)
    except FloatingPointError as error:
        (folder / f"error_{dist.get_rank()}.txt").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
