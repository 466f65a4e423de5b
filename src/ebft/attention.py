"""Block-parallel attention: all rollouts of a document share its keys and values.

A packed row is one document followed by its rollouts. A dense mask over that row would spend most of its work on pairs
that may not attend. On a GPU flex attention skips them (`flex`). Elsewhere the row is cut up: the document attends to
itself causally, and a few neighbouring rollouts at a time attend to the prefix they share plus their own tokens, on a
CPU in two parts (`merged`). `BlockLayout.attention_mask` is the definition all must agree with.

The models reach this code through transformers' `AttentionInterface`; without a plan it is their ordinary attention.
Shape letters: B rows, R = K*N rollouts, S steps (tokens of a rollout), P document tokens, T packed tokens, H key
heads, Q query heads, C queries of a chunk.
"""

import copy
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ._compat import attention_of, set_attention
from .blocks import BlockLayout
from .flex import block_mask, can_flex, flex
from .merged import merged_attention
from .plain import PlainRows

# Where neither `flex` nor `merged` does it: a chunk's rollouts all see each other's keys before masking, so a larger
# chunk wastes work and a smaller one has more overhead; 64 to 256 keys are alike on a CPU. An accelerator pays for
# every launch: four times fewer (counted, not measured).
KEYS_PER_CHUNK_ON_CPU = 128
KEYS_PER_CHUNK = 512
PREFIX = "ebft_"  # of the names our attention is registered under
# Passed instead of a mask: a 4D mask keeps transformers from building its own.
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@dataclass(frozen=True)
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
        decoding: The forward has no document tokens: the documents' keys, and the earlier steps', come from a
            `BlockCache`, in (step, block, rollout) order. Otherwise keys and queries are in (block, rollout, step)
            order.
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
        self.valid = valid
        self._masks: dict = {}
        self._cuts: dict[int, list[Chunk]] = {}

    def next_step(self) -> "BlockPlan":
        """The plan of decoding one token later; masks that are the same then are shared."""
        following = copy.copy(self)
        following.query_steps = range(self.query_steps.start + 1, self.query_steps.stop + 1)
        # Without a window a rollout sees the same of its prefix at every step.
        following._masks = {
            key: mask for key, mask in self._masks.items() if key[0] in ("prefix", "bias") and key[-1] is None
        }
        return following

    @property
    def chunks(self) -> list[Chunk]:
        """Pieces whose rollouts see each other's keys before masking."""
        keys = KEYS_PER_CHUNK_ON_CPU if torch.device(self.device).type == "cpu" else KEYS_PER_CHUNK
        return self.cut(max(1, keys // max(1, self.query_steps.stop)))

    def cut(self, size: int) -> list[Chunk]:
        """Pieces of `size` rollouts, the last may be smaller."""
        if size not in self._cuts:
            firsts = range(0, self.anchors.shape[1] if len(self.query_steps) else 0, size)
            self._cuts[size] = [self._chunk(first, min(first + size, self.anchors.shape[1])) for first in firsts]
        return self._cuts[size]

    def _chunk(self, first: int, last: int) -> Chunk:
        used = self.valid[:, first:last]
        if not used.any():
            return Chunk(first, last, 0, 1)
        begin, end = self.prefix_starts[:, first:last][used].min(), self.anchors[:, first:last][used].max()
        return Chunk(first, last, int(begin), int(end))

    def is_causal(self, window: int | None) -> bool:
        """Whether there are documents alone and nothing but causal order among their tokens."""
        return not self.decoding and not len(self.query_steps) and self.document_mask(window) is None

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

    def prefix_mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """BoolTensor [B or 1, 1, C, end - begin]: which of the chunk's document keys its queries see."""
        key = ("prefix", chunk, window)
        if key not in self._masks:
            rollouts = slice(chunk.first, chunk.last)
            anchors, starts = self.anchors[:, rollouts], self.prefix_starts[:, rollouts]
            if (anchors == anchors[:1]).all() and (starts == starts[:1]).all():
                anchors, starts = anchors[:1], starts[:1]  # the regular layout: one mask for all rows
            anchors, starts = anchors[..., None, None], starts[..., None, None]
            position = torch.arange(chunk.begin, chunk.end)
            step = torch.arange(self.query_steps.start, self.query_steps.stop)[:, None]
            near = _near(anchors + step - position, window)  # [B, rollouts, steps, prefix]
            mask = (position >= starts) & (position < anchors) & near
            self._masks[key] = mask.flatten(1, 2)[:, None].to(self.device)
        return self._masks[key]

    def prefix_bias(self, chunk: Chunk, repeats: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """`prefix_mask` as numbers to add to scores, its rows `repeats` times: [B or 1, 1, repeats * C, end - begin].

        Not -inf: a query may see nothing of the prefix (a sliding window, a block that is not there). Kept in
        decoding alone, where every layer and step needs it and a rollout has one query.
        """
        key = ("bias", chunk, repeats, dtype, window)
        if key in self._masks:
            return self._masks[key]
        mask = self.prefix_mask(chunk, window)
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        bias = bias.masked_fill_(~mask, torch.finfo(dtype).min / 2).repeat(1, 1, repeats, 1)
        if self.decoding:
            self._masks[key] = bias
        return bias

    def own_mask(self, window: int | None) -> Tensor:
        """BoolTensor [steps, own steps]: which of its rollout's own keys a query sees."""
        step = torch.arange(self.query_steps.start, self.query_steps.stop)
        return _near(step[:, None] - torch.arange(self.query_steps.stop), window).to(self.device)

    def chunk_mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """BoolTensor [B or 1, 1, C, end - begin + own keys]: prefix keys first, then the chunk's own rollouts'."""
        key = ("chunk", chunk, window)
        if key not in self._masks:
            prefix = self.prefix_mask(chunk, window)
            same = torch.eye(chunk.last - chunk.first, dtype=torch.bool, device=prefix.device)
            own = same[:, None, :, None] & self.own_mask(window)[:, None, :]  # [rollouts, steps, rollouts, own steps]
            own = (own.transpose(2, 3) if self.decoding else own).flatten(2).flatten(0, 1)
            self._masks[key] = torch.cat([prefix, own.expand(len(prefix), 1, -1, -1)], dim=-1)
        return self._masks[key]

    def block_mask(self, window: int | None) -> BlockMask:
        """The whole forward's mask for flex attention."""
        if ("block", window) not in self._masks:
            self._masks["block", window] = block_mask(self, window)
        return self._masks["block", window]

    def plain_rows(self, batch_size: int) -> PlainRows:
        """The same forward in rows that share nothing."""
        if "plain" not in self._masks:
            self._masks["plain"] = PlainRows(self, batch_size)
        return self._masks["plain"]

    def own_states(self, states: Tensor) -> list[Tensor]:
        """Each chunk's own keys or values out of those of all rollouts [B, H, R*S, d]."""
        sizes = [chunk.last - chunk.first for chunk in self.chunks]
        steps = self.query_steps.stop
        if self.decoding:
            return [own.flatten(2, 3) for own in states.unflatten(2, (steps, -1)).split(sizes, dim=3)]
        return list(states.split([size * steps for size in sizes], dim=2))


class BlockCache(DynamicCache):
    """Keys and values of the documents and, apart from them, of the rollouts' steps so far.

    A layer is handed what it has not got already: in decoding the rollouts' own keys, in (step, block, rollout) order;
    `documents[layer]` stays where it is, uncopied. Sliding-window layers drop nothing: early anchors need it.
    """

    def __init__(self):
        super().__init__()
        self.documents: list[tuple[Tensor, Tensor]] = []  # per layer, keys and values [B, H, P, d]
        self.own: list[tuple[Tensor, ...] | None] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Take in a layer's new keys and values; the documents' come first."""
        new = (key_states, value_states)
        if layer_idx == len(self.documents):
            self.documents.append(new)
            self.own.append(None)
            return new
        before = self.own[layer_idx]
        own = new if before is None else tuple(torch.cat(pair, dim=2) for pair in zip(before, new, strict=True))
        self.own[layer_idx] = own
        return own

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P, once the documents have been through the layer."""
        return self.documents[layer_idx][0].shape[2] if layer_idx < len(self.documents) else 0


def _near(distance: Tensor, window: int | None) -> Tensor:
    """Causal, and within the sliding window if there is one: a token sees itself and `window - 1` before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    document: tuple[Tensor, Tensor] | None = None,
    *,
    scaling=None,
    window=None,
    softcap=None,
    compiled=True,
) -> Tensor:
    """Attention of one packed forward.

    Args:
        query: [B, Q, T, d], T the document's tokens (none in decoding) followed by the rollouts'.
        key: [B, H, P + R*S, d]; in decoding without the document's [B, H, R*S, d].
        value: As `key`.
        plan: Who attends to whom.
        document: In decoding, the document's keys and values [B, H, P, d].
        scaling: Of the scores; 1 / sqrt(d) by default.
        window: Sliding window of this layer, or None.
        softcap: Cap of the scores (Gemma 2), or None.
        compiled: Whether a compiled kernel may do it, where there is one.

    Returns:
        [B, Q, T, d].
    """
    if compiled and can_flex(query, value, softcap) and not plan.is_causal(window):
        if document is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(document, (key, value), strict=True))
        return flex(query, key, value, plan.block_mask(window), scaling)
    parts, own = [], (key, value)
    if document is None:
        # `split`, here and below: the backward of a slice fills a tensor of zeros as large as the whole.
        P = plan.prefix_length
        document_query, query = query.split([P, query.shape[2] - P], dim=2)
        document, own = zip(*(x.split([P, x.shape[2] - P], dim=2) for x in own), strict=True)
        parts.append(_attention(document_query, *document, plan.document_mask(window), scaling, softcap))
    if query.shape[2]:
        if _can_merge(query, value, softcap):
            parts.append(merged_attention(query, document, own, plan, scaling, window))
        else:
            parts.append(_chunked_attention(query, document, own, plan, scaling, window, softcap))
    return torch.cat(parts, dim=2)


def _can_merge(query: Tensor, value: Tensor, softcap) -> bool:
    return query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]


def _chunked_attention(query, document, own, plan: BlockPlan, scaling, window, softcap) -> Tensor:
    """Attention of the rollouts [B, Q, R*S, d], one dense piece per chunk: any device, any kernel."""
    steps = len(plan.query_steps)
    queries = query.split([steps * (chunk.last - chunk.first) for chunk in plan.chunks], dim=2)
    parts = []
    for chunk, part, *chunk_own in zip(plan.chunks, queries, *(plan.own_states(x) for x in own), strict=True):
        prefix = (x[:, :, chunk.begin : chunk.end] for x in document)
        key, value = (torch.cat(pair, dim=2) for pair in zip(prefix, chunk_own, strict=True))
        parts.append(_attention(part, key, value, plan.chunk_mask(chunk, window), scaling, softcap))
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
    return out.reshape(B, heads, C, value.shape[-1])  # some kernels' output is laid out otherwise


def _forward(
    ordinary,
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    block_plan=None,
    block_cache=None,
    compiled=True,
    **kwargs,
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
    document = block_cache.documents[module.layer_idx] if block_cache is not None and block_plan.decoding else None
    options = {"scaling": scaling, "window": window, "softcap": softcap, "compiled": compiled}
    out = attend(query, key, value, block_plan, document, **options)
    return out.transpose(1, 2).contiguous(), None


def _eager(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _ebft_sdpa(*args, **kwargs):
    return _forward(sdpa_attention_forward, *args, **kwargs)


def _ebft_eager(*args, **kwargs):
    return _forward(_eager, *args, compiled=False, **kwargs)


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
            "attn_implementation='sdpa' (block-parallel attention is used on top of it; on a GPU, flex attention)."
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
