"""Rollouts of several micro-batches sampled at once: on a GPU, a decoding step of few tokens is all launches.

The policy is the same for a whole optimiser step, and a rollout's noise depends on its document alone, so sampling
need not go in the pieces that memory sets for the update.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .layouts import joined_layout, stacked
from .rollout import Rollouts

Batch = dict[str, Any]
MOST_PADDING = 1.5  # times the blocks that there are


class SamplingAhead:
    """Hands out each micro-batch's rollouts, sampled together with those of the micro-batches that follow.

    Rows are padded to the longest of a group, so micro-batches that are too unequal are left apart.

    Args:
        sample: Rollouts of a batch, of which it reads `input_ids`, `document_ids` and `layout`.
        rows: How many to sample at a time, at least one micro-batch.

    Attributes:
        in_step: 0, or rows of a whole micro-batch: then they are put together by their number alone, for all
            processes to sample equally often.
    """

    def __init__(self, sample: Callable[[Batch], Rollouts], rows: int):
        self.sample, self.rows, self.in_step = sample, rows, 0
        self._waiting: deque[Batch] = deque()
        self._ready: dict[int, Rollouts] = {}  # by the identity of the layout, which a micro-batch keeps

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """The micro-batches of an optimiser step, in their order; what is left of the last one is dropped."""
        self._waiting = deque(batch for batch in batches if batch["layout"].num_blocks)
        self._ready = {}

    def rollouts(self, inputs: Batch) -> Rollouts:
        """Those of one micro-batch, each [B, K, N, G]; one that is not of the step is sampled by itself."""
        key = id(inputs["layout"])
        if key not in self._ready:
            group = self._next_group(inputs)
            if len(group) < 2:
                return self.sample(inputs)
            merged = joined(group)
            merged["input_ids"] = merged["input_ids"].to(inputs["input_ids"].device, non_blocking=True)
            for batch, rollouts in zip(group, split(self.sample(merged), group), strict=True):
                self._ready[id(batch["layout"])] = rollouts
        return self._ready.pop(key)

    def _next_group(self, inputs: Batch) -> list[Batch]:
        """`inputs` as it was before it went to its device, and those that follow it, up to `rows`."""
        if not any(batch["layout"] is inputs["layout"] for batch in self._waiting):
            return []
        while self._waiting[0]["layout"] is not inputs["layout"]:
            self._waiting.popleft()
        group: list[Batch] = []
        while self._waiting and (not group or self._go_together([*group, self._waiting[0]])):
            group.append(self._waiting.popleft())
        return group

    def _go_together(self, group: list[Batch]) -> bool:
        if self.in_step:
            return len(group) * self.in_step <= self.rows
        rows, blocks = [len(batch["input_ids"]) for batch in group], [batch["layout"].num_blocks for batch in group]
        needed = sum(n * k for n, k in zip(rows, blocks, strict=True))
        return sum(rows) <= self.rows and sum(rows) * max(blocks) <= MOST_PADDING * needed


def joined(batches: Sequence[Batch]) -> Batch:
    """As much of several micro-batches as sampling reads, as one: shorter rows are padded."""
    return {
        "input_ids": stacked([batch["input_ids"] for batch in batches], 0),
        "document_ids": stacked([batch["document_ids"] for batch in batches], -1),
        "layout": joined_layout([batch["layout"] for batch in batches]),
    }


def split(rollouts: Rollouts, batches: Sequence[Batch]) -> list[Rollouts]:
    """The rollouts [B, K, N, G] of `joined(batches)` back to each."""
    rows = [x.split([len(batch["input_ids"]) for batch in batches]) for x in rollouts if x is not None]
    blocks = [batch["layout"].num_blocks for batch in batches]
    return [Rollouts(*(x[:, :k] for x in parts)).shortened() for k, *parts in zip(blocks, *rows, strict=True)]
