"""Ordinary causal batches in place of packed rows, for models that cannot branch a row (state-space, recurrent, ...).

Every document and every rollout, with its whole prefix before it, is a row of its own; what comes out is put where it
would stand in the packed row, so that all that follows is the same for all models.
Shape letters: B rows, K blocks, N rollouts, R = K*N, S steps (tokens of a rollout), P document tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from .blocks import BlockLayout

if TYPE_CHECKING:
    from .attention import BlockPlan

# Picks tokens [M, 1] from logits [M, V] at a step, with whatever else is to be known of them.
Pick = Callable[[Tensor, int], Tensor]


class PlainRows:
    """Which token of a packed row [B, P + R*S] stands where in [B + B*R, L] rows of their own, padded on the right.

    Args:
        plan: Of the packed forward.
        batch_size: B.
    """

    def __init__(self, plan: "BlockPlan", batch_size: int):
        P, S, device = plan.prefix_length, len(plan.query_steps), plan.device
        begin, count = plan.prefix_starts[..., None], (plan.anchors - plan.prefix_starts)[..., None]  # [B, R, 1]
        R = begin.shape[1] if S else 0
        longest = max(P, int(count.max()) + S if R else 0)
        step = torch.arange(longest)
        document = torch.where(step < P, step, 0).expand(batch_size, 1, -1)
        own = P + torch.arange(R)[:, None] * S + step - count[:, :R]
        rollout = torch.where(step < count[:, :R], begin[:, :R] + step, own).where(step < count[:, :R] + S, 0)
        inside = torch.cat([(step < P).expand(batch_size, 1, -1), step < count[:, :R] + S], 1)
        doc_ids = plan.layout.doc_ids
        if doc_ids is not None:
            inside[:, 0, :P] &= doc_ids >= 0
        self.shape, self.steps = (batch_size, P, R), (count[:, :R] + torch.arange(S)).to(device)
        self.source = torch.cat([document, rollout], 1).flatten(1).to(device)  # [B, (1 + R) * L]
        self.mask = inside.long().flatten(0, 1).to(device)

    def unpack(self, ids: Tensor) -> Tensor:
        """Packed [B, P + R*S] -> [B * (1 + R), L]."""
        return ids.gather(1, self.source).view(self.mask.shape)

    def pack(self, hidden: Tensor) -> Tensor:
        """[B * (1 + R), L, H] -> packed [B, P + R*S, H]."""
        B, P, R = self.shape
        document, rollouts = hidden.unflatten(0, (B, 1 + R)).split([1, R], dim=1)
        document = document[:, 0, :P]
        if not R:
            return document
        at = self.steps[..., None].expand(-1, -1, -1, hidden.shape[-1])
        return torch.cat([document, rollouts.gather(2, at).flatten(1, 2)], dim=1)


def decode(decoder: nn.Module, input_ids: Tensor, rows: PlainRows) -> Any:
    """Run the decoder over the rows of a packed forward; `last_hidden_state` of its output is packed."""
    output = decoder(input_ids=rows.unpack(input_ids), attention_mask=rows.mask, use_cache=False)
    output.last_hidden_state = rows.pack(output.last_hidden_state)
    return output


def generate(
    lm: Any,
    input_ids: Tensor,
    layout: BlockLayout,
    shape: Sequence[int],
    stop_token_ids: Sequence[int],
    pick: Pick,
    in_step: bool = False,
) -> None:
    """Let transformers generate behind every block's prefix; `pick` chooses the tokens and keeps them.

    Args:
        lm: A causal LM.
        input_ids: LongTensor [B, P].
        layout: The blocks.
        shape: Of the rollouts, [B, K, N, G].
        stop_token_ids: Ids behind which a row does not go on.
        pick: Given logits [B*K*N, V] and the step; rows that ended are still picked for.
        in_step: Run as many forwards as the other processes do.
    """
    B, _, N, G = shape
    anchors, _, begins = layout.expand(B)
    lengths = anchors - begins
    back = torch.arange(int(lengths.max()), 0, -1)  # distance to the anchor: prefixes are padded on the left
    at = (anchors[..., None] - back).clamp(min=0)
    inside = back <= lengths[..., None]
    rows = torch.arange(B)[:, None, None]
    prompts = input_ids[rows.to(input_ids.device), at.to(input_ids.device)].where(inside.to(input_ids.device), 0)

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        tokens = pick(logits, ids.shape[1] - len(back))
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens, 0.0)

    processors: Any = [process]  # transformers takes any function, and says otherwise
    with own_generation_config(lm, stop_token_ids, pad=0):
        lm.generate(
            prompts.flatten(0, 1).repeat_interleave(N, 0),
            attention_mask=inside.long().flatten(0, 1).repeat_interleave(N, 0).to(input_ids.device),
            max_new_tokens=G,
            do_sample=False,
            synced_gpus=in_step,
            logits_processor=LogitsProcessorList(processors),
        )


@contextmanager
def own_generation_config(model: Any, stop_token_ids: Sequence[int], pad: int):
    """Of the checkpoint's own generation settings nothing: a repetition penalty, say, is not the model."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=list(stop_token_ids) or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = before
