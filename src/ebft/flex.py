"""Attention of packed rows by PyTorch's flex attention, which skips tiles that are masked as a whole; for GPUs.

One call serves the document and its rollouts. A few numbers per token say what it sees; from them come the tiles that
are skipped and, in the kernel, the mask of those that are neither skipped nor whole.
Shape letters: B rows (1 where all see alike), R = K*N rollouts, P document tokens, T queries, M keys, I and J their
tiles, H key heads, Q query heads, d head size.
"""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ._compat import at_most_recompiled

if TYPE_CHECKING:
    from .attention import BlockPlan

TILE = 128  # queries and keys; what the kernels are made for
SMALLEST_HEAD = 16  # they do not do smaller ones
# For fewer queries PyTorch takes a kernel of its own, which does not compile for every size (seen with torch 2.11).
FEWEST_QUERIES = 128
# Of forwards that are compiled apart: with or without gradient, one row or several, decoding, head shapes, ...; a run
# with two networks and evaluation has nine, one more than PyTorch allows by default.
KINDS = 64
NOBODY = 2**30  # a rollout that there is not


class Sight(NamedTuple):
    """What queries see: document keys [begin, end) [B, T], and of their own `rollout` [T] steps in (oldest, step].

    `key_rollout` and `key_step` [M] are the keys'; the document's tokens have none, as queries (-2) and as keys (-1).
    """

    begin: Tensor
    end: Tensor
    rollout: Tensor
    step: Tensor
    oldest: Tensor
    key_rollout: Tensor
    key_step: Tensor


def can_flex(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether the kernels do it: on a GPU that Triton compiles for, queries enough, no cap, heads of a known size."""
    known = query.dtype != torch.float64 and SMALLEST_HEAD <= query.shape[-1] == value.shape[-1]
    return known and softcap is None and query.shape[2] >= FEWEST_QUERIES and _has_kernels(query.device)


@cache
def _has_kernels(device: torch.device) -> bool:
    recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and find_spec("triton") is not None


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Attention of one forward: query [B, Q, T, d], key and value [B, H, M, d] -> [B, Q, T, d].

    Args:
        query: In the order of the plan that `mask` is of.
        key: As `query`.
        value: As `key`.
        mask: From `block_mask`.
        scale: Of the scores; 1 / sqrt(d) if None.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # what PyTorch does for its own attention
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    with at_most_recompiled(KINDS):
        return _kernel(kind)(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


@cache
def _kernel(kind: str) -> Any:
    if kind == "cpu":
        return flex_attention
    # Documents and blocks differ from step to step: without `dynamic` every size would be compiled anew. Beyond the
    # limit of kinds PyTorch would compute all scores, masked or not; `fullgraph` makes that an error.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask(plan: "BlockPlan", window: int | None) -> BlockMask:
    """Which tiles of a forward's scores are computed, and which of these are masked.

    Args:
        plan: Who attends to whom. Keys are the documents' tokens, then the rollouts' in the plan's order; queries are
            the same, in decoding the rollouts' newest tokens alone.
        window: Sliding window of a layer, or None.
    """
    sight = _sight(plan, window)
    masked, whole = _tiles(sight, causal=not plan.decoding)
    # 32 bits, as the kernel's own indices. Each row its own numbers, for the kernel counts rows.
    numbers = [x.expand(len(plan.anchors), -1) for x in sight[:2]] + list(sight[2:])
    numbers = [x.to(plan.device, torch.int32, non_blocking=True).contiguous() for x in numbers]
    begin, end, rollout, step, oldest, key_rollout, key_step = numbers

    def mask_mod(b, h, q, k):
        of_document = (k >= begin[b, q]) & (k < end[b, q])
        of_rollout = (key_rollout[k] == rollout[q]) & (key_step[k] <= step[q]) & (key_step[k] > oldest[q])
        return of_document | of_rollout

    lengths = len(sight.step), len(sight.key_step)
    tiles = (*_listed(masked), *_listed(whole))
    mask = BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=lengths)
    return mask.to(plan.device)


def _tiles(sight: Sight, causal: bool) -> tuple[Tensor, Tensor]:
    """Tiles [B, 1, I, J] of which a part may be seen, and those of which all is.

    From the ends of what a tile's tokens see, so without going through its elements: a tile that the first counts may
    turn out to hold nothing that is seen. `causal` where queries and keys are the same tokens in the same order.
    """
    first = torch.arange(0, len(sight.key_step), TILE)
    begin, end = _by_tile(sight.begin)[..., None, :], _by_tile(sight.end)[..., None, :]
    touched = (begin.amin(-1) < first + TILE) & (end.amax(-1) > first)
    whole = (begin.amax(-1) <= first) & (end.amin(-1) >= first + TILE)
    rollout, key_rollout = (_by_tile(x) for x in (sight.rollout, sight.key_rollout))
    # Without a rollout of its own a tile's lowest is out of reach.
    low, key_low = (x.where(x >= 0, NOBODY).amin(-1) for x in (rollout, key_rollout))
    own = (low[:, None] <= key_rollout.amax(-1)) & (key_low <= rollout.amax(-1)[:, None])
    own = own.tril() if causal else own
    return ((touched | own) & ~whole)[:, None], whole[:, None]


def _by_tile(x: Tensor) -> Tensor:
    """[..., L] -> [..., tiles, TILE]; the last element fills the last tile."""
    missing = -x.shape[-1] % TILE
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1).unflatten(-1, (-1, TILE))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile has [B, 1, I], and which they are, those first: [B, 1, I, J]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _sight(plan: "BlockPlan", window: int | None) -> Sight:
    steps, R, P = plan.query_steps, plan.anchors.shape[1], plan.prefix_length
    step, rollout = torch.arange(steps.start, steps.stop).repeat(R), torch.arange(R).repeat_interleave(len(steps))
    begin, end = (x.repeat_interleave(len(steps), 1) for x in (plan.prefix_starts, plan.anchors))
    position = end + step
    if not plan.decoding:
        place = torch.arange(P).expand(len(end), -1)
        starts = place - plan.layout.position_ids(1)[..., :P]
        begin, end, position = (torch.cat(x, 1) for x in ((starts, begin), (place + 1, end), (place, position)))
        step, rollout = F.pad(step, (P, 0)), F.pad(rollout, (P, 0), value=-2)
    oldest = torch.full_like(step, -1)
    if window is not None:
        begin, oldest = begin.maximum(position - window + 1), step - window
    if (begin == begin[:1]).all() and (end == end[:1]).all():
        begin, end = begin[:1], end[:1]
    return Sight(begin, end, rollout, step, oldest, *_keys(plan))


def _keys(plan: "BlockPlan") -> tuple[Tensor, Tensor]:
    """Rollout and step of each key."""
    steps, R, P = plan.query_steps.stop, plan.anchors.shape[1], plan.prefix_length
    rollout, step = torch.arange(R), torch.arange(steps)
    if plan.decoding:
        rollout, step = rollout.repeat(steps), step.repeat_interleave(R)
    else:
        rollout, step = rollout.repeat_interleave(steps), step.repeat(R)
    return F.pad(rollout, (P, 0), value=-1), F.pad(step, (P, 0), value=-1)
