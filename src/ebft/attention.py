"""Block-parallel attention: all rollouts of a document share its keys and values.

A packed row is one document followed by its rollouts. A dense mask over that row would spend most of its work on pairs
that may not attend, so the row is cut up: the document attends to itself causally, and a few neighbouring rollouts
at a time attend to the prefix they share plus their own tokens. `BlockLayout.attention_mask` is the definition
this must agree with.

The models reach this code through transformers' `AttentionInterface`; without a plan it is their ordinary attention.
Shape letters: B rows, R = K*N rollouts, S steps (tokens of a rollout), P document tokens, T packed tokens, H key
heads, Q query heads, C queries of a chunk.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ._compat import attention_of, set_attention
from .blocks import BlockLayout

# A chunk's rollouts all see each other's keys before masking, so a larger chunk wastes work and a smaller one has more
# overhead; about 128 keys are near the best on a CPU.
KEYS_PER_CHUNK = 128
PREFIX = "ebft_"  # of the names our attention is registered under
# Passed instead of a mask: a 4D mask keeps transformers from building its own.
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Neighbouring rollouts [first, last), in (block, rollout) order, and their document keys [begin, end)."""

    first: int
    last: int
    begin: int
    end: int


class BlockPlan:
    """Who attends to whom in one forward, cut into pieces that waste little; made once, used by every layer.

    Args:
        layout: The blocks.
        batch_size: B.
        num_generations: N; 0 for a forward over the documents alone.
        query_steps: Which tokens of each rollout this forward computes: `range(G)`, or `range(t, t + 1)` in decoding.
        decoding: The documents' and the earlier steps' keys come from a cache, in (step, block, rollout) order; the
            forward has no document tokens. Otherwise keys and queries are in (block, rollout, step) order.
        device: Where the masks go.
    """

    def __init__(
        self,
        layout: BlockLayout,
        batch_size: int,
        num_generations: int,
        query_steps: range,
        *,
        decoding: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.layout = layout
        self.prefix_length = layout.length
        self.query_steps = query_steps
        self.decoding = decoding
        self.device = device
        # Per rollout, [B, R]: where its prefix ends and begins.
        anchors, valid, starts = (x.repeat_interleave(num_generations, 1) for x in layout.expand(batch_size))
        self.anchors, self.prefix_starts = anchors, starts
        self._masks: dict = {}
        self.chunks = self._cut(valid) if len(query_steps) else []

    def _cut(self, valid: Tensor) -> list[Chunk]:
        num_rollouts = self.anchors.shape[1]
        size = max(1, KEYS_PER_CHUNK // self.query_steps.stop)
        chunks = []
        for first in range(0, num_rollouts, size):
            last = min(first + size, num_rollouts)
            used = valid[:, first:last]
            if used.any():
                begin = int(self.prefix_starts[:, first:last][used].min())
                end = int(self.anchors[:, first:last][used].max())
            else:
                begin, end = 0, 1
            chunks.append(Chunk(first, last, begin, end))
        return chunks

    def document_mask(self, window: int | None) -> Tensor | None:
        """BoolTensor [B, 1, P, P], or None where causal order alone is right (padding on the right is never seen)."""
        doc_ids = self.layout.doc_ids
        window = None if window is None or window >= self.prefix_length else window
        if window is None and (doc_ids is None or int(doc_ids.max()) <= 0):
            return None
        if ("document", window) not in self._masks:
            position = torch.arange(self.prefix_length)
            mask = _near(position[:, None] - position[None, :], window)
            if doc_ids is not None:
                mask = mask & (doc_ids[:, :, None] == doc_ids[:, None, :])[:, None]
            self._masks["document", window] = mask.expand(-1 if mask.ndim == 4 else 1, 1, -1, -1).to(self.device)
        return self._masks["document", window]

    def chunk_mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """BoolTensor [B or 1, 1, C, end - begin + own keys]: prefix keys first, then the chunk's own rollouts'."""
        if (chunk.first, window) not in self._masks:
            self._masks[chunk.first, window] = self._chunk_mask(chunk, window).to(self.device)
        return self._masks[chunk.first, window]

    def _chunk_mask(self, chunk: Chunk, window: int | None) -> Tensor:
        steps, rollouts = self.query_steps, slice(chunk.first, chunk.last)
        anchors, starts = self.anchors[:, rollouts], self.prefix_starts[:, rollouts]
        if (anchors == anchors[:1]).all() and (starts == starts[:1]).all():
            anchors, starts = anchors[:1], starts[:1]  # the regular layout: one mask for all rows
        anchors, starts = anchors[..., None, None], starts[..., None, None]
        query_step = torch.arange(steps.start, steps.stop)
        key = torch.arange(chunk.begin, chunk.end)
        distance = anchors + query_step[:, None] - key  # [B, rollouts, steps, prefix]
        prefix = ((key >= starts) & (key < anchors) & _near(distance, window)).flatten(1, 2)

        rollout = torch.arange(chunk.last - chunk.first)
        query_rollout, query_step = rollout.repeat_interleave(len(steps)), query_step.repeat(len(rollout))
        key_step = torch.arange(steps.stop)
        if self.decoding:
            key_rollout, key_step = rollout.repeat(steps.stop), key_step.repeat_interleave(len(rollout))
        else:
            key_rollout, key_step = rollout.repeat_interleave(steps.stop), key_step.repeat(len(rollout))
        own = query_rollout[:, None] == key_rollout[None, :]
        own &= _near(query_step[:, None] - key_step[None, :], window)
        return torch.cat([prefix, own.expand(prefix.shape[0], -1, -1)], dim=-1)[:, None]

    def chunk_keys(self, states: Tensor, chunk: Chunk) -> Tensor:
        """A chunk's own keys or values out of `states` [B, H, P + R*S, d], beside the prefix they share."""
        own = states[:, :, self.prefix_length :]
        steps = self.query_steps.stop
        if self.decoding:
            own = own.unflatten(2, (steps, -1))[:, :, :, chunk.first : chunk.last].flatten(2, 3)
        else:
            own = own[:, :, chunk.first * steps : chunk.last * steps]
        return torch.cat([states[:, :, chunk.begin : chunk.end], own], dim=2)


def _near(distance: Tensor, window: int | None) -> Tensor:
    """Causal, and within the sliding window if there is one: a token sees itself and `window - 1` before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scaling=None, window=None, softcap=None
) -> Tensor:
    """Attention of one packed forward.

    Args:
        query: [B, Q, T, d], T the document's tokens (none in decoding) followed by the rollouts'.
        key: [B, H, P + R*S, d].
        value: As `key`.
        plan: Who attends to whom.
        scaling: Of the scores; 1 / sqrt(d) by default.
        window: Sliding window of this layer, or None.
        softcap: Cap of the scores (Gemma 2), or None.

    Returns:
        [B, Q, T, d].
    """
    P = 0 if plan.decoding else plan.prefix_length
    parts = []
    if P:
        mask = plan.document_mask(window)
        parts.append(_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P], mask, scaling, softcap))
    steps = len(plan.query_steps)
    for chunk in plan.chunks:
        chunk_query = query[:, :, P + chunk.first * steps : P + chunk.last * steps]
        chunk_key, chunk_value = plan.chunk_keys(key, chunk), plan.chunk_keys(value, chunk)
        parts.append(_attention(chunk_query, chunk_key, chunk_value, plan.chunk_mask(chunk, window), scaling, softcap))
    return torch.cat(parts, dim=2)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling, softcap) -> Tensor:
    """One dense piece; `mask` [B or 1, 1, C, keys], None for causal."""
    if mask is None and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    # The heads that share a key head become further queries of it: no copy of the keys, and any kernel will do.
    B, heads, C, d = query.shape
    H, repeats = key.shape[1], heads // key.shape[1]
    query = query.reshape(B, H, repeats * C, d)
    mask = mask.repeat(1, 1, repeats, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = query @ key.transpose(-1, -2) * (d**-0.5 if scaling is None else scaling)
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return out.view(B, heads, C, value.shape[-1])


def _forward(
    ordinary, module, query, key, value, attention_mask, scaling=None, dropout=0.0, block_plan=None, **kwargs
):
    """What transformers calls. Returns ([B, T, Q, d], None), as its own attention functions do."""
    if block_plan is None:
        return ordinary(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} uses attention with `{name}`, which block rollouts cannot honour."
            )
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    out = attend(query, key, value, block_plan, scaling=scaling, window=window, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def _eager(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _ebft_sdpa(*args, **kwargs):
    return _forward(sdpa_attention_forward, *args, **kwargs)


def _ebft_eager(*args, **kwargs):
    return _forward(_eager, *args, **kwargs)


AttentionInterface.register(PREFIX + "sdpa", _ebft_sdpa)
AttentionInterface.register(PREFIX + "eager", _ebft_eager)
AttentionMaskInterface.register(PREFIX + "sdpa", sdpa_mask)
AttentionMaskInterface.register(PREFIX + "eager", eager_mask)


def enable_block_attention(model: PreTrainedModel) -> None:
    """Let `model` take a `block_plan`; its forward without one stays what it was, to the last bit.

    Raises:
        ValueError: The model's attention implementation cannot take a mask per query (FlashAttention).
    """
    name = attention_of(model.config)
    if name.startswith(PREFIX):
        return
    if name not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation='{name}' cannot express block rollouts; load the model with "
            "attn_implementation='sdpa' (block-parallel attention is used on top of it)."
        )
    set_attention(model.config, PREFIX + name)


@contextmanager
def block_attention(model: PreTrainedModel):
    """`enable_block_attention` for the duration of a forward without gradient: leaves `model` as it was."""
    before = attention_of(model.config)
    enable_block_attention(model)
    try:
        yield
    finally:
        set_attention(model.config, before)
