"""Whether a run fits its device: said before it starts, and explained where memory ran out all the same."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from .checkpoints import last_complete_checkpoint
from .config import EBFTConfig
from .engine_checks import engine_of_run
from .features import FeatureNetwork
from .footprint import what_fits
from .forward import causal_lm
from .planning import Work
from .sizes import longest_row, run_footprint

GIB = 2**30


def device_memory(device: torch.device, available: bool = False) -> int:
    """Bytes of memory of a device: a GPU's own, or the machine's for a CPU.

    Args:
        device: Which.
        available: Of a CPU, what is free now instead of all.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    memory = psutil.virtual_memory()
    return memory.available if available else memory.total


class MemoryGuard:
    """Knows what a run should hold in memory, and which micro-batch is at work.

    Args:
        args: Settings of the run.
        policy: The model to train.
        network: The feature network, or None.
        reference: The initial policy, or None.
    """

    def __init__(
        self, args: EBFTConfig, policy: nn.Module, network: FeatureNetwork | None, reference: nn.Module | None
    ):
        self.args = args
        shared = {"processes": args.world_size, "engine": engine_of_run(args)}
        self.footprint = run_footprint(args, policy, network, reference, **shared)
        self.quantised = bool(getattr(causal_lm(policy), "is_quantized", False))
        self.row: Work | None = None
        self._begin()

    def _begin(self) -> None:
        self.together = 0  # rows, while several micro-batches are sampled at once
        self.evaluates = False
        self.rows = self.args.per_device_train_batch_size

    def check_weights(self) -> None:
        """Before anything is on the device.

        Raises:
            ValueError: Weights, gradients and the optimiser's state alone exceed the device.
        """
        lasting, limit = self.footprint.lasting(), device_memory(self.args.device)
        needed = sum(lasting.values())
        if self.args.world_size == 1 and not self.quantised and needed > limit and "adamw_torch" in self.args.optim:
            raise ValueError(
                f"the model does not fit: {in_gib(lasting)} make {needed / GIB:.1f} GiB, and {self.args.device} has "
                f"{limit / GIB:.1f} GiB; train an adapter (use_peft: true), or take a smaller model."
            )

    def check_dataset(self, rows: Any, anchors: str) -> None:
        """Before the first update: warn, once, where the longest document's micro-batch should not fit."""
        self._begin()  # another run of the same trainer may have ended anywhere
        if not hasattr(rows, "with_format") or not hasattr(rows, "__len__"):
            return
        self.row = longest_row(rows, self.args, anchors)
        memory, limit = self.footprint.memory(self.row, self.rows), device_memory(self.args.device)
        if memory["total"] > limit and self.args.process_index == 0:
            warnings.warn(
                f"per_device_train_batch_size={self.rows} may need {memory['total'] / GIB:.1f} GiB at the longest "
                f"documents, and {self.args.device} has {limit / GIB:.1f} GiB; if memory runs out, "
                f"{self._remedy(limit)}.",
                stacklevel=2,
            )

    def at_work(self, inputs: dict[str, Any], evaluates: bool = False) -> None:
        """A micro-batch begins, of training or of evaluation; what memory is about, should it run out."""
        self.evaluates, layout = evaluates, inputs["layout"]
        self.rows, length = inputs["input_ids"].shape
        blocks, prefixes = layout.num_blocks, (layout.anchors - layout.prefix_starts).double().sum(-1).max()
        self.row = Work(length, blocks, float(prefixes), length * (length + 1) / 2)

    @contextmanager
    def sampling(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Several micro-batches are sampled at once, as one; what memory is about meanwhile."""
        before = self.rows, self.row
        self.at_work(inputs)
        self.together = self.rows if self.rows > self.args.per_device_train_batch_size else 0
        yield
        # Not where memory ran out: the explanation comes then.
        self.together, (self.rows, self.row) = 0, before

    def _remedy(self, limit: float) -> str:
        assert self.row is not None
        if self.together:
            return f"set per_device_generation_batch_size: {self.together // 2}"
        if self.evaluates and self.rows == 1:
            return "lower max_length, or evaluate afterwards with `ebft evaluate` (eval_strategy: no)"
        if self.evaluates:
            return f"set per_device_eval_batch_size: {self.rows // 2}"
        return what_fits(self.footprint, self.row, self.rows, self.args.gradient_accumulation_steps, limit)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Run what may run out of memory.

        Raises:
            ValueError: It did: with what the plan says of the micro-batch at work, what to change, and where the last
                checkpoint is.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(self._explanation(error)) from error

    def _explanation(self, error: BaseException) -> str:
        args, limit = self.args, device_memory(self.args.device)
        checkpoint = last_complete_checkpoint(str(args.output_dir))
        resume = (
            f"{checkpoint} is intact: go on with --resume_from_checkpoint {checkpoint}"
            if checkpoint
            else f"there is no checkpoint yet (save_steps={args.save_steps})"
        )
        if self.row is None:
            return f"out of memory on {args.device} before the first micro-batch ({error}); {resume}."
        if self.together or self.evaluates:
            doing = "evaluating" if self.evaluates else "sampling"
            return (
                f"out of memory on {args.device} while {doing} {self.rows} rows of up to {self.row.tokens} tokens and "
                f"{self.row.blocks} blocks at once; to go on, {self._remedy(limit)}. {resume}."
            )
        memory = self.footprint.memory(self.row, self.rows)
        shown = {name: size for name, size in memory.items() if name != "total" and not name.startswith("in ")}
        return (
            f"out of memory on {args.device} at per_device_train_batch_size={args.per_device_train_batch_size}: this "
            f"micro-batch has {self.rows} rows of {self.row.tokens} tokens and {self.row.blocks} blocks. The plan "
            f"says {in_gib(shown)}, {memory['total'] / GIB:.2f} GiB at the worst moment; the device has "
            f"{limit / GIB:.2f} GiB, less what others hold. To go on, {self._next(memory['total'], limit)}. {resume}."
        )

    def _next(self, planned: float, limit: float) -> str:
        """A remedy that needs clearly less than what was planned, since that was too much."""
        return self._remedy(min(limit, 0.8 * planned))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or a CPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))


def in_gib(items: dict[str, float]) -> str:
    """`weights 3.10 GiB, gradients 3.10 GiB`: what is not next to nothing."""
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in items.items() if size > 0.005 * GIB) or "little"
