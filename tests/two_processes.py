"""Training runs for any number of processes; as a script, started by torch.distributed.run, it does them all."""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from benchmarks.fsdp2_on_cpu import FSDP2Trainer
from ebft import EBFTTrainer
from hostile import Hostile
from training import documents, reseal, small_model, train

# In batches of two, and every second one to the second process: that one has no document with a block.
LOPSIDED = documents([23, 17, 5, 3, 30, 26, 6, 4])
MIXED = documents([23, 5, 17, 30, 6, 12, 3, 26])
PROMPTED = documents([23, 17, 5, 4, 30, 26, 6, 7], prompts=[9, 5, 4, 3, 11, 25, 2, 6])
# The first process could sample all of its micro-batches' rollouts at once, the second could not: too much padding.
UNEVEN = documents([23, 23, 8, 8, 23, 23, 38, 38])
# Of whole completions, the second process has none, and the first goes on for longer than nobody looks at.
COMPLETIONS = dict(
    rows=documents([23, 17, 5, 3, 30, 26, 6, 4], prompts=[9, 5, 5, 3, 11, 9, 6, 4]),
    rollout="completion",
    max_completion_length=20,
    stop_token_ids=list(range(1, 20)),
)
CASES = {
    "full": dict(rows=LOPSIDED, evaluated=True),
    "no_cross_entropy": dict(rows=LOPSIDED, ce_coef=0.0, gradient_checkpointing=True),
    "lora": dict(rows=LOPSIDED, adapted=True, beta=0.5, per_device_generation_batch_size=4),
    "answers": dict(rows=PROMPTED, completion_only_loss=True, loss_normalization="document"),
    "packed": dict(rows=documents([20] * 8), packing=True, rows_per_process=1),
    "stream": dict(rows=MIXED, stream=True),
    "rbf": dict(rows=LOPSIDED, kernel="rbf", evaluated=True),
    "fourier_stream": dict(rows=MIXED, kernel="characteristic", kernel_frequencies=16, stream=True),
    "learned": dict(rows=LOPSIDED, feature_network="learned", feature_classifier_learning_rate=0.05, evaluated=True),
    "ngram": dict(rows=LOPSIDED, kernel="ngram", evaluated=True),
}
SHARDED = {name: CASES[name] for name in ("full", "no_cross_entropy", "lora", "stream")} | {
    "gathered": dict(rows=MIXED, gather_for_sampling=True, evaluated=True),
    "compiled": dict(rows=LOPSIDED, torch_compile=True, torch_compile_backend="eager", evaluated=True),
    "k3": dict(rows=UNEVEN, beta=0.5, kl_estimator="k3", per_device_generation_batch_size=4),
    "completions": COMPLETIONS,
    "completions_of_mamba": COMPLETIONS | dict(family="mamba"),
}
# With checkpoints, half-way one to go on from elsewhere.
LONG = dict(
    max_steps=10,
    gradient_accumulation_steps=1,
    optim="adamw_torch",
    learning_rate=1e-3,
    max_grad_norm=1.0,
    save_strategy="steps",
    save_steps=5,
    logging_steps=5,
)
LONG_RUNS = {"long": dict(rows=MIXED, **LONG), "long_lora": dict(rows=MIXED, adapted=True, **LONG)}
ENGINES = {"ddp": EBFTTrainer, "fsdp2": FSDP2Trainer}
# DeepSpeed's ZeRO, in processes of its own: accelerate cannot change engines once it has begun.
_ZERO2 = ("full", "no_cross_entropy", "lora", "stream", "learned", "completions")
ZERO = {name: {"stage": 2} for name in _ZERO2} | {
    "ngram": {"stage": 1},
    "rbf": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def run(name: str, folder: Path, processes: int, *, trainer_class=EBFTTrainer, resume=None, dtype=None, **more):
    """Two steps on all documents each, with plain SGD; the same documents whatever the number of processes."""
    settings = dict(max_steps=2, gradient_accumulation_steps=2, ddp_timeout=120) | (CASES | SHARDED | LONG_RUNS)[name]
    settings |= more
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
    options = {} if dtype is None else {"dtype": dtype}
    model = small_model(settings.pop("family", "qwen2"), scale=8.0, **options)
    return train(model, rows, folder, resume, settings=settings, trainer_class=trainer_class, **keywords)


def zero(**optimization) -> dict:
    """DeepSpeed's settings, for any optimiser and in the model's precision."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    freely = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return dict.fromkeys(auto, "auto") | freely | {"zero_optimization": {"stage": 2} | optimization}


class SecondRankPoisoned(EBFTTrainer):
    """The rewards of the second process are not numbers, in the second step."""

    def compute_rewards(self, inputs, rollouts):
        gram, rewards = super().compute_rewards(inputs, rollouts)
        if self.args.process_index == 1 and self.state.global_step == 1:
            rewards = rewards._replace(total=rewards.total * torch.nan)
        return gram, rewards


def main(folder: Path) -> None:
    """All cases into `folder`, whose files the test compares with those of one process."""
    for engine, cases in {"ddp": CASES | LONG_RUNS, "fsdp2": SHARDED | LONG_RUNS}.items():
        for name in cases:
            finished = run(name, folder / engine / name, processes=2, trainer_class=ENGINES[engine])
            if finished.trainer.is_world_process_zero() or name in LONG_RUNS:
                torch.save(finished.weights, folder / engine / f"{name}_{dist.get_rank()}.pt")
            if name in LONG_RUNS:
                finished.trainer.save_model()
    stop_at_the_poison(folder)


def zero_main(folder: Path) -> None:
    """The cases of ZeRO, and the long ones once more from their middle."""
    for name, optimization in (ZERO | {long: {"stage": 2} for long in LONG_RUNS}).items():
        finished = run(name, folder / name, processes=2, deepspeed=zero(**optimization))
        assert finished.trainer.model_wrapped.zero_optimization_stage() == optimization["stage"]
        torch.save(finished.weights, folder / f"{name}_{dist.get_rank()}.pt")
    for name in LONG_RUNS:
        if dist.get_rank() == 0:
            shutil.copytree(folder / name, folder / "resumed" / name)
        dist.barrier()
        copy = folder / "resumed" / name
        finished = run(name, copy, processes=2, deepspeed=zero(), resume=str(copy / "checkpoint-5"))
        torch.save(finished.weights, folder / "resumed" / f"{name}_{dist.get_rank()}.pt")
    stop_at_the_poison(folder, deepspeed=zero())
    go_where_latest_leads(folder)


def go_where_latest_leads(folder: Path) -> None:
    """Resume a checkpoint whose `latest` names a folder other than DeepSpeed's, with a pickle that leaves a mark."""
    checkpoint = folder / "led" / "checkpoint-5"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "long", folder / "led")
        shutil.copytree(checkpoint / "global_step5", folder / "led" / "elsewhere")
        for path in (folder / "led" / "elsewhere").iterdir():
            torch.save(Hostile(folder / "mark"), path)
        (checkpoint / "latest").write_text("../elsewhere")
        reseal(checkpoint)
    dist.barrier()
    try:
        run("long", folder / "led", processes=2, deepspeed=zero(), resume=str(checkpoint))
    except ValueError as error:
        (folder / f"led_{dist.get_rank()}.txt").write_text(str(error))


def stop_at_the_poison(folder: Path, **settings) -> None:
    try:
        run("packed", folder / "poisoned", processes=2, trainer_class=SecondRankPoisoned, **settings)
    except FloatingPointError as error:
        (folder / f"error_{dist.get_rank()}.txt").write_text(str(error))


def resumed(folder: Path, processes: int) -> None:
    """The long runs of two processes, copied and gone on with from their middle."""
    for engine, trainer_class in ENGINES.items():
        for name in LONG_RUNS:
            copy = folder / f"on_{processes}" / engine / name
            if dist.get_rank() == 0:
                shutil.copytree(folder / engine / name, copy)
            dist.barrier()
            finished = run(name, copy, processes, trainer_class=trainer_class, resume=str(copy / "checkpoint-5"))
            if dist.get_rank() == 0:
                torch.save(finished.weights, copy.with_suffix(".pt"))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if "--zero" in sys.argv:
        zero_main(where)
    elif "--resume" in sys.argv:
        dist.init_process_group("gloo")
        resumed(where, dist.get_world_size())
    else:
        main(where)
    dist.barrier()
    dist.destroy_process_group()
