"""Short training runs on tiny models, and what they leave behind."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import TrainerCallback

from ebft import EBFTConfig, EBFTTrainer
from ebft.checkpoints import MANIFEST, checksums, files_of, read_manifest
from ebft.sharding import whole
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

# One optimiser step of plain SGD over everything, in the dataset's order, unless a test says otherwise.
SETTINGS = dict(
    max_steps=1,
    per_device_train_batch_size=64,
    gradient_accumulation_steps=1,
    train_sampling_strategy="sequential",
    optim="sgd",
    learning_rate=0.3,
    lr_scheduler_type="constant",
    warmup_steps=0,
    max_grad_norm=0.0,  # no clipping, which would hide a gradient that is wrong by a factor
    max_length=40,
    stride=5,
    context_length=4,
    completion_length=3,
    num_generations=3,
    temperature=0.3,
    ce_coef=0.3,
    rollout_save_steps=1,
    save_strategy="no",
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
)
OF_BLOCKS = ("stride", "context_length", "completion_length")  # and refused for whole completions


def config(folder, **settings) -> EBFTConfig:
    ours = dict(SETTINGS)
    if settings.get("rollout") == "completion":
        for name in OF_BLOCKS:
            del ours[name]
    return EBFTConfig(output_dir=str(folder), **(ours | settings))


def small_model(family="qwen2", **options):
    """A tiny model of the tokenizer's size."""
    return tiny_model(family, vocab_size=len(byte_bpe_tokenizer()), **options)


def documents(lengths, vocabulary=61, seed=0, prompts=None) -> list[dict]:
    """Random token ids; with `prompts`, the length of each prompt, also the mask of what is not prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = [{"input_ids": torch.randint(3, vocabulary, (n,), generator=generator).tolist()} for n in lengths]
    for row, prompt in zip(rows, prompts or [], strict=False):
        row["completion_mask"] = [int(p >= prompt) for p in range(len(row["input_ids"]))]
    return rows


def reseal(checkpoint: Path) -> None:
    """Make the manifest of an altered checkpoint say what is there, as whoever alters one can."""
    manifest = read_manifest(checkpoint)
    manifest["files"] = checksums(checkpoint, files_of(checkpoint))
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


class Weights(TrainerCallback):
    """Keeps a copy of the trained weights before every step and after the last."""

    def __init__(self):
        self.history = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._keep(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._keep(model)

    def _keep(self, model):
        self.history.append({name: whole(weight).clone() for name, weight in model.state_dict().items()})


def trainer(model, rows, folder, trainer_class=EBFTTrainer, settings=None, **keywords) -> EBFTTrainer:
    """A trainer on rows (a list or dataset); `settings` go into the config, keywords to the trainer."""
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    keywords.setdefault("processing_class", byte_bpe_tokenizer())
    return trainer_class(model, config(folder, **(settings or {})), train_dataset=dataset, **keywords)


def train(model, rows, folder, resume=None, **keywords) -> SimpleNamespace:
    """Train; the trainer, its weights before each step and after the last, metrics and rollouts."""
    weights = Weights()
    ours = trainer(model, rows, folder, callbacks=[weights, *keywords.pop("callbacks", [])], **keywords)
    ours.train(resume_from_checkpoint=resume)
    return SimpleNamespace(trainer=ours, weights=weights.history, folder=Path(folder), metrics=read_metrics(folder))


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def read_rollouts(folder, step=1) -> dict[tuple[int, int], list[dict]]:
    """The rows of each group, by document and anchor; nothing if the step had no block."""
    path = Path(folder) / "rollouts" / f"step_{step:06d}.parquet"
    groups: dict[tuple[int, int], list[dict]] = {}
    for row in pq.read_table(path).to_pylist() if path.exists() else []:
        groups.setdefault((row["document_id"], row["block"]), []).append(row)
    return groups


def files(folder, pattern) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob(pattern))}


def relative_error(before: dict, after: dict, expected: dict) -> float:
    """Norm of what is wrong with an update, in norms of the update."""
    assert before.keys() == after.keys() == expected.keys()
    wrong = sum(float((after[k] - expected[k]).double().square().sum()) for k in before)
    update = sum(float((expected[k] - before[k]).double().square().sum()) for k in before)
    assert update > 1e-8, "the step did nothing"
    return (wrong / update) ** 0.5


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
