"""Times the engine's own stages on this machine, on a few layers with random weights, and scales them to a whole run.

Three cuts of the model that is to be trained are timed by turns: its first layer with the whole vocabulary, and its
first 1 and 3 layers with a small one. The difference of the last two is what layers cost; beside a large vocabulary it
would be lost in the noise.
Shape letters: B rows, K blocks, N rollouts, P document tokens, V vocabulary.
"""

import random
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import Trainer

from .config import EBFTConfig
from .cut import Cut
from .data import BlockCollator
from .features import FeatureNetwork, layer_list
from .footprint import ADAMW, FLOAT32, Footprint, Weights, largest_batch
from .forward import causal_lm
from .layouts import batch_layout
from .measuring import seconds
from .planning import Documents, Method, Work, operations

VOCABULARY = 1024  # tokens of the cuts whose layers are compared
DEPTHS = (1, 3)  # their layers
BUDGET = 60.0  # seconds of measuring to aim at, after the warm-up
MOST_ROUNDS = 5
MOST_OPERATIONS = 2e12  # of one layer's micro-batch on a CPU: larger ones are timed in part
OPTIMISED = 2**26  # parameters that the optimiser's step is timed on, at most
DRAWS = 256  # random micro-batches to find a typical one among


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch that is typical of a run.

    Attributes:
        batch: As the collator makes it, with its `layout`; on the CPU.
        share: Its padded tokens, rollouts included, over those of the run's average micro-batch.
    """

    batch: dict[str, Any]
    share: float

    @property
    def rows(self) -> int:
        """B."""
        return len(self.batch["input_ids"])


def typical_micro_batch(
    rows, documents: Documents, args: EBFTConfig, anchors: str, method: Method, most_rows: int
) -> MicroBatch:
    """A micro-batch of the run's own documents whose padded size is near the average.

    Args:
        rows: The tokenised training set; anything where `documents` could not be counted.
        documents: Their sizes.
        args: Of the run.
        anchors: `completion` or `all`.
        method: N and G.
        most_rows: How many rows may be timed; a run's larger micro-batch is then scaled from them.
    """

    def padded(sizes: list[Work]) -> float:
        return len(sizes) * (max(s.tokens for s in sizes) + method.decoded(max(s.blocks for s in sizes)))

    sizes, batch_size = documents.row_sizes, args.per_device_train_batch_size
    if sizes is None:
        timed = min(batch_size, most_rows)
        batch = _regular_batch(timed, int(documents.sizes[0].tokens))
        return MicroBatch(batch | {"layout": batch_layout(batch, args, anchors, step=0)}, timed / batch_size)
    draw = random.Random(args.seed)
    batch_size = min(batch_size, len(sizes))
    whole = [draw.sample(range(len(sizes)), batch_size) for _ in range(DRAWS)]
    timed = min(batch_size, most_rows)
    mean = statistics.mean(padded([sizes[i] for i in chosen]) for chosen in whole)
    chosen = min(whole, key=lambda chosen: abs(padded([sizes[i] for i in chosen[:timed]]) - mean * timed / batch_size))
    chosen = chosen[:timed]
    batch: dict[str, Any] = BlockCollator(0, args.document_masking)([rows[i] for i in chosen])
    batch["layout"] = batch_layout(batch, args, anchors, step=0)
    return MicroBatch(batch, padded([sizes[i] for i in chosen]) / mean)


def _regular_batch(rows: int, length: int) -> dict[str, Any]:
    ids = torch.arange(rows * length).view(rows, length)
    whole = torch.ones_like(ids, dtype=torch.bool)
    document_ids = torch.arange(rows)[:, None]
    return {
        "input_ids": ids,
        "doc_ids": torch.zeros_like(ids),
        "labels": ids,
        "completion_mask": whole,
        "document_ids": document_ids,
    }


def one_layer_operations(footprint: Footprint, documents: Documents) -> float:
    """Floating-point operations of an average row's update with one layer: what is timed first."""
    _, row = documents.step(1)
    shape = footprint.policy
    shape = replace(shape, layers=1, matrices=shape.matrices / shape.layers)
    return operations(row, footprint.method, shape, None, footprint.checkpointing)["update"]


def most_rows(footprint: Footprint, row: Work, update: float, limit: float, device: torch.device) -> int:
    """Rows that are timed at most: what fits, and on a CPU what does not take too long.

    Args:
        footprint: Of the run.
        row: Its largest row.
        update: What `one_layer_operations` says.
        limit: Bytes of the device.
        device: Where.

    Raises:
        ValueError: Not even one row of one layer fits.
    """
    weights = footprint.weights
    head = footprint.policy.vocabulary * footprint.policy.hidden
    one_layer = weights.policy / footprint.policy.layers + 2 * FLOAT32 * head
    kept = Weights(policy=one_layer, trained=int(min(weights.trained, one_layer / FLOAT32)), head=weights.head)
    cut = replace(footprint, weights=kept, policy=replace(footprint.policy, layers=1))
    fits = largest_batch(cut, row, limit + ADAMW * kept.trained)  # which is not there
    if not fits:
        raise ValueError(
            f"calibrate: one row of {row.tokens:.0f} tokens and one layer do not fit into {limit / 2**30:.3g} GiB; "
            "lower max_length, or give --flops instead."
        )
    return min(fits, max(1, int(MOST_OPERATIONS / update))) if device.type == "cpu" else fits


def stage_seconds(
    args: EBFTConfig, policy: nn.Module, network: FeatureNetwork | None, method: Method, micro_batch: MicroBatch
) -> dict[str, float]:
    """Seconds of each stage on the run's average micro-batch with the whole model, of the optimiser's step once.

    Args:
        args: Settings of the run.
        policy: The model to train, on the meta device.
        network: Its feature network, likewise, or None.
        method: Of the run.
        micro_batch: What is timed.

    Returns:
        `sampling`, `features`, `reference`, `update` (those the run has), and `optimiser`.
    """
    layers = len(layer_list(causal_lm(policy).base_model)[1])
    tops = {"features": 0 if network is None else max(network.layer_indices)}
    cuts = [
        Cut(args, policy, network, depth, vocabulary, micro_batch.batch, method)
        for depth, vocabulary in [(DEPTHS[0], None), *((depth, VOCABULARY) for depth in DEPTHS)]
    ]
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        rounds = progress.add_task("Timing the engine's stages", total=1 + MOST_ROUNDS)
        if args.device.type != "cpu":  # the first step compiles the kernels of attention: it says nothing of the rest
            for cut in cuts:
                cut.step()
        times = [[cut.step()] for cut in cuts]
        warm_up = sum(sum(measured[0].values()) for measured in times)
        count = min(MOST_ROUNDS, int(BUDGET / warm_up))  # 0 where the warm-up took too long to be repeated
        progress.update(rounds, total=1 + count, advance=1)
        for _ in range(count):
            for measured, cut in zip(times, cuts, strict=True):
                measured.append(cut.step())
            progress.advance(rounds)
    times = [measured[1:] or measured for measured in times]
    whole, *thin = ({k: statistics.median(t[k] for t in measured) for k in measured[0]} for measured in times)
    out = {}
    for stage, first in whole.items():
        depth = tops.get(stage, layers)
        shallow, deep = (min(d, depth) for d in DEPTHS)
        layer = max(0.0, thin[1][stage] - thin[0][stage]) / max(1, deep - shallow)
        out[stage] = (first + (depth - shallow) * layer) / micro_batch.share
    return out | {"optimiser": optimiser_seconds(args, policy)}


def optimiser_seconds(args: EBFTConfig, policy: nn.Module) -> float:
    """Seconds of one step of the run's optimiser, with the norm and the clipping of the gradients before it."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    taken: list[nn.Parameter] = []
    for parameter in trained:
        size = parameter.numel()
        if not taken or sum(p.numel() for p in taken) + size <= OPTIMISED:
            rows = min(1.0, OPTIMISED / size)
            shape = (max(1, int(parameter.shape[0] * rows)), *parameter.shape[1:])
            taken.append(nn.Parameter(torch.randn(shape, device=args.device)))
    for parameter in taken:
        parameter.grad = torch.randn_like(parameter)
    optimiser_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimiser = optimiser_class(taken, **options)

    def step() -> None:
        nn.utils.get_total_norm([p.grad for p in taken if p.grad is not None])
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(taken, args.max_grad_norm)
        optimiser.step()

    times = [seconds(step, args.device) for _ in range(1 + MOST_ROUNDS)][1:]
    share = sum(p.numel() for p in taken) / sum(p.numel() for p in trained)
    return statistics.median(times) / share
