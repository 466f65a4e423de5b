"""Cross-entropy of a model on held-out documents, over all tokens and over answer tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockLayout
from ..forward import evaluation_mode
from ..logprobs import document_and_block_log_probs
from ..metrics import cross_entropy_sums
from .batches import batches_of
from .intervals import DocumentMean


@torch.no_grad()
def cross_entropy(
    model: nn.Module, documents: Iterable[dict[str, Any]], *, batch_size: int = 8
) -> dict[str, DocumentMean]:
    """Nats per token of each document, at temperature 1; a document's first token is given.

    Args:
        model: A causal LM, on any device.
        documents: Rows of `ebft.data.tokenize_documents` (not packed), EOS included.
        batch_size: Documents per forward.

    Returns:
        `all`: over all tokens; `answer`: over those of completions, the same for raw text.

    Raises:
        ValueError: There are no documents.
    """
    parts: list[dict[str, Tensor]] = []
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in batches_of(documents, batch_size, device):
            parts.append({name: value.cpu() for name, value in _batch_sums(model, batch).items()})
    sums = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {
        "all": DocumentMean(sums["ce_loss/all"], sums["all_tokens"]),
        "answer": DocumentMean(sums["ce_loss/answer"], sums["answer_tokens"]),
    }


def _batch_sums(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums and token counts of each document, [B]."""
    input_ids, doc_ids = batch["input_ids"], batch["doc_ids"].cpu()
    B, P = input_ids.shape
    nowhere = torch.zeros(B, 0, dtype=torch.long)
    layout = BlockLayout(P, 1, 1, 1, nowhere, nowhere.bool(), nowhere, doc_ids=doc_ids)
    log_probs, _ = document_and_block_log_probs(model, input_ids, input_ids.new_zeros(B, 0, 1, 1), layout)
    return cross_entropy_sums(log_probs, batch)
