"""The LM head, a few rows at a time: log-probs of given tokens, or their weighted sum, without ever all logits.

Shape letters: M rows of hidden states, S targets of a row, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import TopKLogitsWarper, TopPLogitsWarper

from .forward import Head, at_least_float32

# Elements of the logits that are in memory at a time. On a CPU few, which stay near its caches; an accelerator wants
# large products.
LOGITS_PER_CHUNK = 2**27  # 512 MiB in float32
LOGITS_PER_CHUNK_ON_CPU = 2**22
FEWEST_ROWS = 128  # below, a large vocabulary's head spends its time on reading and adding up weights

Support = tuple[float, int, float]  # temperature, top_k, top_p
Columns = list[tuple[Support, int]]  # runs of the S targets of a row, and on which support they are scored


def logits_per_chunk(device: torch.device) -> int:
    """Elements of the logits that are computed at a time."""
    return LOGITS_PER_CHUNK_ON_CPU if device.type == "cpu" else LOGITS_PER_CHUNK


def rows_per_chunk(head: Head, device: torch.device) -> int:
    """How many rows of logits may be in memory at once."""
    return max(FEWEST_ROWS, logits_per_chunk(device) // head.vocab_size)


def restrict(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """Logits [M, V] at a temperature, -inf outside the top-k / top-p support; rows of `keep` [M, S] stay inside.

    Sampling and update both go through here, so that a rollout is scored on the support it was drawn from. `keep`
    holds the drawn tokens: rounding must not push one just outside.
    """
    logits = logits if temperature == 1 else logits / temperature
    restricted = logits
    if top_k > 0:
        restricted = TopKLogitsWarper(top_k)(None, restricted)  # type: ignore[arg-type]
    if top_p < 1:
        restricted = TopPLogitsWarper(top_p)(None, restricted)  # type: ignore[arg-type]
    if keep is None or restricted is logits:
        return restricted
    return restricted.scatter(-1, keep, logits.gather(-1, keep))


def head_log_probs(hidden: Tensor, targets: Tensor, head: Head, columns: Columns) -> Tensor:
    """Log-probs of several targets per row of hidden states; the logits are computed again in the backward.

    Args:
        hidden: [M, H].
        targets: LongTensor [M, S].
        head: Hidden rows to logits.
        columns: The support of each run of the S columns.

    Returns:
        [M, S], float32 or float64.
    """

    def one_chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits, runs = head(rows), ids.split([count for _, count in columns], dim=-1)
        parts = [_TargetLogProbs.apply(logits, run, support) for (support, _), run in zip(columns, runs, strict=True)]
        return torch.cat(parts, dim=-1)  # type: ignore[arg-type]

    if not len(hidden):
        return at_least_float32(hidden.new_zeros(targets.shape))
    size = rows_per_chunk(head, hidden.device)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([one_chunk(*chunk) for chunk in chunks])
    return torch.cat(
        [checkpoint(one_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )


class Weighted(NamedTuple):
    """Rows [M, H] of hidden states, their targets and the targets' weights [M, S], and on which support they score."""

    hidden: Tensor
    targets: Tensor
    weights: Tensor
    columns: Columns


def head_weighted_sum(groups: list[Weighted], head: Head) -> tuple[Tensor, list[Tensor]]:
    """Sum of weights times log-probs over all groups; the log-probs come beside it, without gradient.

    With the weights known, each chunk's gradient is formed while its logits are there: they are computed once, not
    twice. Until the backward the gradients of rows and head are kept.

    Args:
        groups: Rows of which some may be none.
        head: Hidden rows to logits.

    Returns:
        The sum [] with gradient, and the log-probs [M, S] of each group.
    """
    hidden = [group.hidden for group in groups]
    parameters = head.parameters(hidden[0])
    total, *log_probs = _WeightedSum.apply(head, groups, *hidden, *parameters)  # type: ignore[misc]
    return total, log_probs


def _all_log_probs(logits: Tensor, targets: Tensor, support: Support) -> Tensor:
    """[M, V] on a support that includes the targets."""
    return restrict(at_least_float32(logits), *support, keep=targets).log_softmax(-1)


def _logits_gradient(log_probs: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Gradient [M, V] of the weighted sum of the targets' log-probs; overwrites `log_probs` [M, V].

    d log p(y) / d logit(v) = ([v = y] - p(v)) / temperature.
    """
    weights = weights / temperature
    return log_probs.exp_().mul_(-weights.sum(-1, keepdim=True)).scatter_add_(-1, targets, weights)


class _TargetLogProbs(torch.autograd.Function):
    """Log-softmax and gather in one: their own backwards pass four more times over the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, support: Support) -> Tensor:
        log_probs = _all_log_probs(logits, targets, support)
        ctx.save_for_backward(log_probs, targets)
        ctx.temperature, ctx.dtype = support[0], logits.dtype
        return log_probs.gather(-1, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        log_probs, targets = ctx.saved_tensors
        return _logits_gradient(log_probs.clone(), targets, grad, ctx.temperature).to(ctx.dtype), None, None


class _WeightedSum(torch.autograd.Function):
    """`head_weighted_sum`: the gradient of rows and of the head's parameters is made in the forward."""

    @staticmethod
    def forward(ctx: Any, head: Head, groups: list[Weighted], *tensors: Tensor):
        parameters = list(tensors[len(groups) :])
        head_grads: list[Tensor] = []
        row_grads, log_probs = [], []
        total = torch.zeros((), dtype=torch.promote_types(tensors[0].dtype, torch.float32), device=tensors[0].device)
        for group in groups:
            results = [_chunk(head, chunk, parameters, head_grads) for chunk in _chunks(group, head)]
            empty = at_least_float32(group.hidden.new_zeros(group.targets.shape))
            log_probs.append(torch.cat([found for found, _ in results]) if results else empty)
            row_grads.append(torch.cat([grad for _, grad in results]) if results else torch.zeros_like(group.hidden))
            # A log-prob of -inf may have weight 0.
            total += torch.where(group.weights != 0, log_probs[-1] * group.weights, 0.0).sum()
        ctx.save_for_backward(*row_grads, *(head_grads or map(torch.zeros_like, parameters)))
        ctx.mark_non_differentiable(*log_probs)
        return total, *log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        return None, None, *(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)


def _chunks(group: Weighted, head: Head) -> Iterator[Weighted]:
    size = rows_per_chunk(head, group.hidden.device)
    for first in range(0, len(group.hidden), size):
        hidden, targets, weights = (x[first : first + size] for x in group[:3])
        yield Weighted(hidden, targets, weights, group.columns)


def _chunk(head: Head, chunk: Weighted, parameters: list[Tensor], head_grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs [M, S] and the gradient [M, H] of a few rows; that of the head is added up in `head_grads`."""
    with torch.enable_grad():
        rows = chunk.hidden.detach().requires_grad_()
        logits = head(rows)
    log_probs, gradient = _log_probs_and_gradient(logits.detach(), chunk.targets, chunk.weights, chunk.columns)
    row_grad, *grads = torch.autograd.grad(logits, [rows, *parameters], gradient)
    if head_grads:
        for total, grad in zip(head_grads, grads, strict=True):
            total += grad
    else:
        head_grads += grads
    return log_probs, row_grad


def _log_probs_and_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Log-probs [M, S] of a chunk's targets and the gradient [M, V] of their weighted sum."""
    counts = [count for _, count in columns]
    parts, gradient = [], None
    for (support, _), ids, slopes in zip(columns, targets.split(counts, -1), weights.split(counts, -1), strict=True):
        log_probs = _all_log_probs(logits, ids, support)
        parts.append(log_probs.gather(-1, ids))
        part = _logits_gradient(log_probs, ids, slopes.to(log_probs), support[0])
        gradient = part if gradient is None else gradient.add_(part)
    assert gradient is not None
    return torch.cat(parts, dim=-1), gradient.to(logits.dtype)
