"""Small models and their trainings with one trainer: cross-entropy from scratch, more of it (SFT), and EBFT."""

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    set_seed,
)

from ..config import EBFTConfig
from ..trainer import EBFTTrainer

# What makes a run SFT or EBFT; all else, learning rate included, is the same for both.
SFT: dict[str, Any] = {"rl_coef": 0.0, "ce_coef": 1.0}
EBFT: dict[str, Any] = {}  # the library's defaults: rl_coef 1, ce_coef 0.03, whitening "paper", 4 rollouts of 8 tokens


def new_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights."""
    set_seed(seed)
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    return Qwen2ForCausalLM(config)


def train(
    model: str | Path | Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    folder: Path,
    objective: dict[str, Any],
    **settings: Any,
) -> float:
    """One epoch over `documents`; the model, its tokenizer and `metrics.jsonl` end up in `folder`.

    Returns:
        Seconds of training.
    """
    args = EBFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        max_length=max(map(len, documents["input_ids"])),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **{"per_device_train_batch_size": 4, **objective, **settings},
    )
    model = str(model) if isinstance(model, Path) else model
    trainer = EBFTTrainer(model=model, args=args, train_dataset=documents, processing_class=tokenizer)
    # One bar with the time left, in place of a line per step: those are in metrics.jsonl.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar(folder.name))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    return seconds


class Bar(TrainerCallback):
    """A progress bar with the step's cross-entropy and the time left."""

    def __init__(self, name: str):
        self.progress = Progress(
            TextColumn(f"{name:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, CE {task.fields[ce]:.3f}, left:"),
            TimeRemainingColumn(),
        )

    def on_train_begin(self, args, state, control, **kwargs):
        """Show the bar."""
        self.task = self.progress.add_task("", total=state.max_steps, ce=float("nan"))
        self.progress.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest cross-entropy and step."""
        ce = (logs or {}).get("ce_loss")
        self.progress.update(self.task, completed=state.global_step, **({} if ce is None else {"ce": ce}))

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the full bar standing."""
        self.progress.stop()
