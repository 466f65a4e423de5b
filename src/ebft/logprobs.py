"""Log-probabilities of documents and rollouts in one forward, without ever holding all logits.

Logits are computed only for positions that predict something, a chunk of rows at a time (`lm_head`). One document
position may predict several things: the document's next token (at temperature 1), and the first token of every rollout
of the block that starts there (at the sampling temperature): one row of logits serves them all.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, M rows of logits, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import BlockPlan
from .blocks import BlockLayout
from .forward import Head, Parts, install
from .lm_head import Columns, Support, Weighted, head_log_probs, head_weighted_sum


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
    rows = Rows(layout, tokens.shape, document_mask, input_ids.device)
    support = (temperature, top_k, top_p)

    def read(hidden: Tensor, head: Head) -> LogProbs:
        groups = zip(rows.hidden(hidden), rows.pick(input_ids[:, 1:], tokens), rows.columns(support), strict=True)
        return rows.place([head_log_probs(states, ids, head, columns) for states, ids, columns in groups])

    return _packed_forward(model, input_ids, tokens, layout, read)


def document_and_block_loss(
    model: nn.Module,
    input_ids: Tensor,
    tokens: Tensor,
    layout: BlockLayout,
    weights: LogProbs,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    document_mask: Tensor | None = None,
) -> tuple[Tensor, LogProbs]:
    """Sum of `weights` times the log-probs of `document_and_block_log_probs`, which come beside it without gradient.

    Any loss that is linear in the log-probs has this form, REINFORCE and cross-entropy among them. With the weights
    known beforehand the LM head runs once instead of twice, and blocks whose weights are all zero, as those of equal
    rewards are, are left out of forward and backward: their log-probs come out as zero.

    Args:
        model: A causal LM, a peft model around one, or either wrapped by DDP.
        input_ids: LongTensor [B, P].
        tokens: LongTensor [B, K, N, G].
        layout: The blocks.
        weights: `document` [B, P-1] and `blocks` [B, K, N, G]; constants. Ignored where there is no log-prob.
        temperature: As there, like `top_k`, `top_p` and `document_mask`.
        top_k: See `temperature`.
        top_p: See `temperature`.
        document_mask: See `temperature`.

    Returns:
        The sum [] with gradient, and the log-probs.
    """
    if layout.doc_ids is not None and layout.num_blocks:
        active = (weights.blocks != 0).flatten(2).any(-1).cpu() & layout.valid
        if active.sum(-1).max() < layout.valid.sum(-1).max():
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "document_mask": document_mask}
            return _loss_of_some_blocks(model, input_ids, tokens, layout, weights, active, **options)
    rows = Rows(layout, tokens.shape, document_mask, input_ids.device)
    support = (temperature, top_k, top_p)

    def read(hidden: Tensor, head: Head) -> tuple[Tensor, LogProbs]:
        return rows.weighted_sum(hidden, head, input_ids, tokens, weights, support)

    return _packed_forward(model, input_ids, tokens, layout, read)


def _loss_of_some_blocks(
    model: nn.Module,
    input_ids: Tensor,
    tokens: Tensor,
    layout: BlockLayout,
    weights: LogProbs,
    active: Tensor,
    **options,
) -> tuple[Tensor, LogProbs]:
    """`document_and_block_loss` of the blocks where `active` [B, K], the others' log-probs zero."""
    order = layout.order(active).to(tokens.device)[..., None, None].expand(-1, -1, *tokens.shape[2:])
    chosen, slopes = tokens.gather(1, order), LogProbs(weights.document, weights.blocks.gather(1, order))
    loss, found = document_and_block_loss(model, input_ids, chosen, layout.select(active), slopes, **options)
    return loss, LogProbs(found.document, found.blocks.new_zeros(tokens.shape).scatter(1, order, found.blocks))


def block_log_probs(model: nn.Module, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, **support) -> Tensor:
    """Log-probs [B, K, N, G] of the rollouts alone; arguments as in `document_and_block_log_probs`."""
    nowhere = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=torch.bool)
    return document_and_block_log_probs(model, input_ids, tokens, layout, document_mask=nowhere, **support).blocks


def _within_documents(layout: BlockLayout, batch_size: int) -> Tensor:
    if layout.doc_ids is None:
        return torch.ones(batch_size, layout.length - 1, dtype=torch.bool)
    return (layout.doc_ids[:, 1:] == layout.doc_ids[:, :-1]) & (layout.doc_ids[:, 1:] >= 0)


def _packed_forward(model: nn.Module, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, read) -> Any:
    """`read(hidden [B, P + K*N*(G-1), H], head)`, of one forward over the documents and their rollouts."""
    install(model)
    B, K, N, G = tokens.shape
    plan = BlockPlan(layout, B, N if K else 0, range(G - 1), device=input_ids.device)
    # A rollout's last token predicts nothing, so it is never fed in.
    packed_ids = torch.cat([input_ids, tokens[..., :-1].flatten(1)], dim=1)
    document, blocks = layout.position_ids(N).split([layout.length, K * N * G], dim=-1)
    blocks = blocks.unflatten(-1, (K * N, G))[..., :-1].flatten(-2)
    position_ids = torch.cat([document, blocks], dim=-1).expand(B, -1)

    def forward(parts: Parts) -> Any:
        hidden = parts.hidden(packed_ids, plan, position_ids)
        return read(hidden, parts.head)

    return model(input_ids=packed_ids, packed=forward)


class Rows:
    """Which rows of a packed forward's hidden states predict what, in three groups.

    A row that starts a block has 1 + N targets: the document's next token and the first token of each rollout. Then
    come the other rows of the document whose next token is wanted, and the rollouts' own, with one target each. All
    of it is known on the CPU, so that no device has to be waited for.

    Args:
        layout: The blocks.
        shape: Of the rollouts, (B, K, N, G).
        document_mask: BoolTensor [B, P-1], or None for all tokens within a document.
        device: Of the hidden states.
    """

    def __init__(
        self, layout: BlockLayout, shape: tuple[int, ...], document_mask: Tensor | None, device: torch.device
    ):
        (B, K, N, G), P = shape, layout.length
        self.shape, self.length = shape, P
        mask = _within_documents(layout, B) if document_mask is None else document_mask.cpu()
        anchors, valid, _ = layout.expand(B)
        b, k = valid.nonzero(as_tuple=True)
        before = anchors[b, k] - 1  # the row of the document that starts the block, [M]
        rest = torch.zeros(B, P, dtype=torch.bool)
        rest[:, :-1] = mask
        rest[b, before] = False
        # One row is kept at all times, with weight zero, so that every parameter takes part in every rank's backward.
        rest[0, 0] |= not len(b) and not rest.any()
        rest_b, rest_p = rest.nonzero(as_tuple=True)

        # Rows are counted in [B, P + K*N*(G-1)], values in [B, P-1] of the documents and on in [B, K, N, G].
        length, blocks = P + K * N * (G - 1), B * (P - 1)
        rollout = k[:, None] * N + torch.arange(N)  # [M, N]
        fed = P + rollout[..., None] * (G - 1) + torch.arange(G - 1)  # [M, N, G-1]
        scored = blocks + ((b * K * N)[:, None] + rollout)[..., None] * G + torch.arange(G)  # [M, N, G]
        started = torch.cat([(b * (P - 1) + before)[:, None], scored[..., 0]], dim=-1)
        plain, continued = (rest_b * (P - 1) + rest_p)[:, None], scored[..., 1:].flatten()[:, None]
        rows = [b * length + before, rest_b * length + rest_p, ((b * length)[:, None, None] + fed).flatten()]
        self.rows = [index.to(device, non_blocking=True) for index in rows]
        self.values = [index.to(device, non_blocking=True) for index in (started, plain, continued)]
        self.document_mask = mask.to(device, non_blocking=True)

    def columns(self, support: Support) -> list[Columns]:
        """On which support each group's targets are scored: the documents' at temperature 1."""
        everything: Support = (1.0, 0, 1.0)
        return [[(everything, 1), (support, self.shape[2])], [(everything, 1)], [(support, 1)]]

    def hidden(self, hidden: Tensor) -> list[Tensor]:
        """Hidden states of each group's rows, each [M, H]; `hidden` [B, P + K*N*(G-1), H]."""
        return [hidden.flatten(0, 1).index_select(0, rows) for rows in self.rows]

    def pick(self, document: Tensor, blocks: Tensor) -> list[Tensor]:
        """Values of each group's targets, each [M, S], out of `document` [B, P-1] and `blocks` [B, K, N, G]."""
        values = torch.cat([document.flatten(), blocks.flatten()])
        return [values[index] for index in self.values]

    def place(self, groups: list[Tensor]) -> LogProbs:
        """The groups' values [M, S] where they belong, zeros elsewhere."""
        B, K, N, G = self.shape
        document, blocks = B * (self.length - 1), B * K * N * G
        index, found = (torch.cat([x.flatten() for x in parts]) for parts in (self.values, groups))
        document, blocks = found.new_zeros(document + blocks).scatter(0, index, found).split([document, blocks])
        document = document.view(B, -1).where(self.document_mask, 0.0)
        return LogProbs(document, blocks.view(self.shape))

    def weighted_sum(
        self,
        hidden: Tensor,
        head: Head,
        input_ids: Tensor,
        tokens: Tensor,
        weights: LogProbs,
        support: Support,
    ) -> tuple[Tensor, LogProbs]:
        """Sum of `weights` times the log-probs, with gradient, and the log-probs without."""
        slopes = self.pick(weights.document.detach() * self.document_mask, weights.blocks.detach())
        targets = self.pick(input_ids[:, 1:], tokens)
        groups = zip(self.hidden(hidden), targets, slopes, self.columns(support), strict=True)
        total, log_probs = head_weighted_sum([Weighted(*group) for group in groups], head)
        return total, self.place(log_probs)
