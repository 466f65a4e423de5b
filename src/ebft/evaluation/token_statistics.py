"""Log-prob of every token of a document and entropy of the distribution it was drawn from, in one forward.

Shape letters: B rows, P document tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import BlockPlan
from ..blocks import BlockLayout
from ..forward import Parts, at_least_float32, install
from ..lm_head import rows_per_chunk


class TokenStatistics(NamedTuple):
    """`log_probs` and `entropy` [B, P-1] in nats, of token p+1 given 0..p; meaningless across documents' borders."""

    log_probs: Tensor
    entropy: Tensor


@torch.no_grad()
def token_statistics(
    model: nn.Module, input_ids: Tensor, doc_ids: Tensor, temperature: float = 1.0
) -> TokenStatistics:
    """What a model says of given text; a few rows of logits are in memory at a time.

    Args:
        model: A causal LM, on the device of `input_ids`.
        input_ids: LongTensor [B, P].
        doc_ids: LongTensor [B, P] on the CPU, -1 for padding on the right.
        temperature: What logits are divided by, above 0.
    """
    B, P = input_ids.shape
    nowhere = torch.zeros(B, 0, dtype=torch.long)
    layout = BlockLayout(P, 1, 1, 1, nowhere, nowhere.bool(), nowhere, doc_ids=doc_ids)
    plan = BlockPlan(layout, B, 0, range(0), device=input_ids.device)

    def run(parts: Parts) -> TokenStatistics:
        hidden = parts.hidden(input_ids, plan, layout.position_ids(1))[:, :-1].flatten(0, 1)
        targets, size = input_ids[:, 1:].flatten(), rows_per_chunk(parts.head, input_ids.device)
        found = [[], []]
        for rows, ids in zip(hidden.split(size), targets.split(size), strict=True):
            log_probs = (at_least_float32(parts.head(rows)) / temperature).log_softmax(-1)
            found[0].append(log_probs.gather(-1, ids[:, None])[:, 0])
            found[1].append(-(log_probs.exp() * log_probs).sum(-1))
        return TokenStatistics(*(torch.cat(part).view(B, P - 1) for part in found))

    install(model)
    return model(input_ids=input_ids, packed=run)
