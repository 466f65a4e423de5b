"""Attention of rollouts in two parts, the prefix they share and their own tokens, merged by log-sum-exp; for the CPU.

Beside one dense piece per chunk (`attention.attend`) no query meets the own tokens of other rollouts, and no keys are
copied to stand next to each other, for the forward or to be kept for the backward.

With scores s over all keys, L = log sum exp s, and each part's own l and output o, the whole output is the sum of
exp(l - L) o. The gradient of a part is that of its own softmax with L in place of l.
Shape letters: B rows, R = K*N rollouts, S steps of the queries, U steps of the own keys, H key heads, Q query heads,
P document tokens, d head size.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._compat import flash_attention, flash_attention_backward

if TYPE_CHECKING:
    from .attention import BlockPlan

QUERIES_PER_CHUNK = 128  # more would meet too many masked keys, fewer have more overhead


def merged_attention(
    query: Tensor, document: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], plan: "BlockPlan", scale, window
) -> Tensor:
    """Attention of the rollouts of one forward.

    Args:
        query: [B, Q, R*S, d], in (rollout, step) order.
        document: Keys and values [B, H, P, d].
        own: Keys and values [B, H, R*U, d], in the plan's order.
        plan: Who attends to whom.
        scale: Of the scores; 1 / sqrt(d) if None.
        window: Sliding window of this layer, or None.

    Returns:
        [B, Q, R*S, d].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, *document, *own)
    if torch.is_autocast_enabled("cpu"):  # what PyTorch does for its own attention
        tensors = tuple(x.to(torch.get_autocast_dtype("cpu")) for x in tensors)
    return _Merged.apply(*tensors, plan, scale, window)  # type: ignore[return-value]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, document_key, document_value, own_key, own_value, plan, scale, window) -> Tensor:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=_at_least_float32(query))
        for part, keys, bias in _chunks(query, plan, window, document_key.shape[1]):
            chunk_out, chunk_lse = flash_attention(
                _by_key_head(query[:, :, part], document_key),
                document_key[:, :, keys],
                document_value[:, :, keys],
                bias,
                scale,
            )
            out[:, :, part] = chunk_out.reshape(out[:, :, part].shape)
            lse[:, :, part] = chunk_lse.reshape(lse[:, :, part].shape)
        shape = _Own(query, own_key, plan)
        scores = shape.scores(query, own_key, scale, window)
        own_lse = shape.to_queries(scores.logsumexp(-1))
        whole = torch.logaddexp(lse, own_lse)
        own_out = (scores - shape.by_rollout(whole)[..., None]).exp() @ shape.keys(own_value)
        out.mul_((lse - whole).exp()[..., None]).add_(shape.to_queries(own_out))
        ctx.save_for_backward(query, document_key, document_value, own_key, own_value, out, whole)
        ctx.options = plan, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, document_key, document_value, own_key, own_value, out, lse = ctx.saved_tensors
        plan, scale, window = ctx.options
        query_grad, key_grad, value_grad = (torch.zeros_like(x) for x in (query, document_key, document_value))
        for part, keys, bias in _chunks(query, plan, window, document_key.shape[1]):
            parts = [_by_key_head(x[:, :, part], document_key) for x in (grad, query, out, lse)]
            document = document_key[:, :, keys], document_value[:, :, keys]
            grads = flash_attention_backward(parts[0], parts[1], *document, parts[2], parts[3], bias, scale)
            query_grad[:, :, part] = grads[0].reshape(query_grad[:, :, part].shape)
            key_grad[:, :, keys] += grads[1]
            value_grad[:, :, keys] += grads[2]
        shape = _Own(query, own_key, plan)
        scores = shape.scores(query, own_key, scale, window)
        probs = (scores - shape.by_rollout(lse)[..., None]).exp()
        out_grad, mean = shape.by_rollout(grad), shape.by_rollout((grad * out).sum(-1, dtype=lse.dtype))
        score_grad = probs * (out_grad @ shape.keys(own_value).mT - mean[..., None]) * scale
        query_grad += shape.to_queries(score_grad @ shape.keys(own_key))
        own_grads = score_grad.mT @ shape.by_rollout(query), probs.mT @ out_grad
        own = (shape.to_keys(x).to(query.dtype) for x in own_grads)
        return query_grad, key_grad, value_grad, *own, None, None, None


def _chunks(query: Tensor, plan: "BlockPlan", window: int | None, key_heads: int):
    """Slices of the queries and of the document's keys, and the bias that masks what a query may not see."""
    steps, repeats = len(plan.query_steps), query.shape[1] // key_heads
    # In decoding, with one query per rollout, half as many: their prefixes reach further and further.
    for chunk in plan.cut(max(1, QUERIES_PER_CHUNK // max(2, steps))):
        part, keys = slice(chunk.first * steps, chunk.last * steps), slice(chunk.begin, chunk.end)
        yield part, keys, plan.prefix_bias(chunk, repeats, query.dtype, window)


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """[B, Q, C, ...] -> [B, H, Q/H * C, ...]: heads that share a key head are further queries of it."""
    return x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


class _Own:
    """The rollouts' own tokens, a small attention each, in float32 or better; queries are [B, H, R, Q/H * S, ...]."""

    def __init__(self, query: Tensor, own_key: Tensor, plan: "BlockPlan"):
        self.plan, self.key_heads = plan, own_key.shape[1]
        self.steps, self.own_steps = len(plan.query_steps), plan.query_steps.stop
        self.repeats = query.shape[1] // self.key_heads

    def by_rollout(self, x: Tensor) -> Tensor:
        """[B, Q, R*S, ...] -> [B, H, R, Q/H * S, ...]."""
        x = x.unflatten(1, (self.key_heads, self.repeats)).unflatten(3, (-1, self.steps))
        return x.transpose(2, 3).flatten(3, 4).to(_at_least_float32(x))

    def to_queries(self, x: Tensor) -> Tensor:
        """Back again."""
        return x.unflatten(3, (self.repeats, self.steps)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """[B, H, R*U, d] in the plan's order -> [B, H, R, U, d]."""
        x = x.to(_at_least_float32(x))
        if self.plan.decoding:
            return x.unflatten(2, (self.own_steps, -1)).transpose(2, 3)
        return x.unflatten(2, (-1, self.own_steps))

    def to_keys(self, x: Tensor) -> Tensor:
        """Back again."""
        return (x.transpose(2, 3) if self.plan.decoding else x).flatten(2, 3)

    def scores(self, query: Tensor, own_key: Tensor, scale: float, window: int | None) -> Tensor:
        """Masked scores [B, H, R, Q/H * S, U]."""
        scores = self.by_rollout(query) @ self.keys(own_key).mT * scale
        return scores.masked_fill_(~self.plan.own_mask(window).repeat(self.repeats, 1), float("-inf"))


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
