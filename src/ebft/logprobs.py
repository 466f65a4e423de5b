"""Log-probabilities of documents and rollouts in one forward, without ever holding all logits.

Logits are computed only for positions that predict something, a chunk of rows at a time, and again in the backward.
One document position may predict several things: the document's next token (at temperature 1), and the first token of
every rollout of the block that starts there (at the sampling temperature): one row of logits serves them all.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, M rows of logits, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TopKLogitsWarper, TopPLogitsWarper

from .attention import BlockPlan
from .blocks import BlockLayout
from .forward import Head, PackedForward, at_least_float32, gathered_rows, install

LOGITS_PER_CHUNK = 2**25  # 128 MiB in float32


class LogProbs(NamedTuple):
    """`document` [B, P-1]: of token p+1 given 0..p; `blocks` [B, K, N, G]. Zero where not asked for or not valid."""

    document: Tensor
    blocks: Tensor


def document_and_block_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    tokens: Tensor,
    layout: BlockLayout,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    document_mask: Tensor | None = None,
) -> LogProbs:
    """Log-probs of the documents' tokens and of their rollouts, with gradient, in one call of `model`.

    Args:
        model: A causal LM, a peft model around one, or either wrapped by DDP.
        input_ids: LongTensor [B, P].
        tokens: LongTensor [B, K, N, G], the rollouts; K may be 0.
        layout: The blocks.
        temperature: tau of the rollouts' log-probs; the documents' are at 1.
        top_k: Sampling support of the rollouts, as in `sample_blocks`; 0 is all.
        top_p: Likewise; 1 is all.
        document_mask: BoolTensor [B, P-1]: where the documents' log-probs are wanted; by default everywhere within a
            document.

    Returns:
        Log-probs in nats; float32, or float64 if the model is.
    """
    install(model)
    B, K, N, G = tokens.shape
    device = input_ids.device
    if document_mask is None:
        document_mask = _within_documents(layout, B)
    plan = BlockPlan(layout, B, N if K else 0, range(G - 1), device=device)
    # A rollout's last token predicts nothing, so it is never fed in.
    packed_ids = torch.cat([input_ids, tokens[..., :-1].flatten(1)], dim=1)
    position_ids = _without_last_step(layout.position_ids(N), layout, N).expand(B, -1)

    def read(hidden: Tensor, head: Head) -> LogProbs:
        support = (temperature, top_k, top_p)
        return _read_log_probs(hidden, head, input_ids, tokens, layout, document_mask.to(device), support)

    return model(input_ids=packed_ids, packed=PackedForward(plan, position_ids, read))


def block_log_probs(model: nn.Module, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, **support) -> Tensor:
    """Log-probs [B, K, N, G] of the rollouts alone; arguments as in `document_and_block_log_probs`."""
    nowhere = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=torch.bool)
    return document_and_block_log_probs(model, input_ids, tokens, layout, document_mask=nowhere, **support).blocks


def restrict(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """Logits [M, V] at a temperature, -inf outside the top-k / top-p support; rows of `keep` [M, S] stay inside.

    Sampling and update both go through here, so that a rollout is scored on the support it was drawn from. `keep`
    holds the drawn tokens: rounding must not push one just outside.
    """
    logits = logits / temperature
    restricted = logits
    if top_k > 0:
        restricted = TopKLogitsWarper(top_k)(None, restricted)  # type: ignore[arg-type]
    if top_p < 1:
        restricted = TopPLogitsWarper(top_p)(None, restricted)  # type: ignore[arg-type]
    if keep is None or restricted is logits:
        return restricted
    return restricted.scatter(-1, keep, logits.gather(-1, keep))


def _within_documents(layout: BlockLayout, batch_size: int) -> Tensor:
    if layout.doc_ids is None:
        return torch.ones(batch_size, layout.length - 1, dtype=torch.bool)
    return (layout.doc_ids[:, 1:] == layout.doc_ids[:, :-1]) & (layout.doc_ids[:, 1:] >= 0)


def _without_last_step(position_ids: Tensor, layout: BlockLayout, N: int) -> Tensor:
    document, blocks = position_ids.split([layout.length, position_ids.shape[-1] - layout.length], dim=-1)
    blocks = blocks.unflatten(-1, (layout.num_blocks * N, layout.completion_length))[..., :-1].flatten(-2)
    return torch.cat([document, blocks], dim=-1)


def _read_log_probs(hidden, head: Head, input_ids, tokens, layout: BlockLayout, document_mask, support) -> LogProbs:
    """Read all log-probs off the hidden states [B, P + K*N*(G-1), H] of one packed forward."""
    B, K, N, G = tokens.shape
    P, device = input_ids.shape[1], hidden.device
    anchors, valid, _ = (x.to(device, non_blocking=True) for x in layout.expand(B))
    next_ids = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)  # the last column is never read

    # Rows of the document that start a block: the next token, and the first token of each of its rollouts.
    at_anchor = torch.zeros(B, P, dtype=torch.bool, device=device)
    at_anchor[torch.arange(B, device=device)[:, None].expand_as(anchors)[valid], (anchors - 1)[valid]] = True
    rows = gathered_rows(hidden, anchors - 1)[valid]
    targets = torch.cat([next_ids.gather(1, anchors - 1)[..., None], tokens[..., 0]], dim=-1)[valid]
    started = head_log_probs(rows, targets, head, [((1.0, 0, 1.0), 1), (support, N)])

    # The other rows of the document whose next token is wanted. One is kept at all times, with weight zero, so that
    # every parameter takes part in every rank's backward.
    rest = torch.zeros_like(at_anchor)
    rest[:, :-1] = document_mask
    rest &= ~at_anchor
    rest[0, 0] |= ~valid.any() & ~document_mask.any()
    plain = head_log_probs(hidden[:, :P][rest], next_ids[rest][:, None], head, [((1.0, 0, 1.0), 1)])

    following = (
        hidden[:, P:].unflatten(1, (K, N * (G - 1))) if K and G > 1 else hidden.new_zeros(B, K, 0, hidden.shape[-1])
    )
    rows, targets = following[valid].flatten(0, 1), tokens[..., 1:].flatten(2)[valid].flatten()[:, None]
    continued = head_log_probs(rows, targets, head, [(support, 1)])

    document = started.new_zeros(B, P).masked_scatter(rest, plain[:, 0])
    document = document.masked_scatter(at_anchor, started[:, 0])[:, :-1]
    blocks = started.new_zeros(B, K, N, G)
    first, others = started[:, 1:], continued.view(len(started), N, G - 1)
    blocks = blocks.masked_scatter(valid[..., None, None], torch.cat([first[..., None], others], dim=-1))
    return LogProbs(document * document_mask, blocks)


def rows_per_chunk(head: Head) -> int:
    """How many rows of logits may be in memory at once."""
    return max(16, LOGITS_PER_CHUNK // head.vocab_size)


def head_log_probs(hidden: Tensor, targets: Tensor, head: Head, columns: list[tuple[tuple, int]]) -> Tensor:
    """Log-probs of several targets per row of hidden states, a chunk of logits at a time.

    Args:
        hidden: [M, H].
        targets: LongTensor [M, S].
        head: Hidden rows to logits.
        columns: `((temperature, top_k, top_p), count)` for each run of the S columns.

    Returns:
        [M, S], float32 or float64. The logits are computed again in the backward instead of being kept.
    """

    def one_chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits = at_least_float32(head(rows))
        parts = []
        for (temperature, top_k, top_p), part in zip(
            (c for c, _ in columns), ids.split([n for _, n in columns], -1), strict=True
        ):
            scaled = restrict(logits, temperature, top_k, top_p, keep=part)
            parts.append(scaled.gather(-1, part) - scaled.logsumexp(-1, keepdim=True))
        return torch.cat(parts, dim=-1)

    if not len(hidden):
        return at_least_float32(hidden.new_zeros(targets.shape))
    size = rows_per_chunk(head)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([one_chunk(*chunk) for chunk in chunks])
    return torch.cat(
        [checkpoint(one_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )
