"""Held-out documents to padded batches, in the order given."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data import BlockCollator


def batches_of(
    documents: Iterable[dict[str, Any]], batch_size: int, device: torch.device | str
) -> Iterator[dict[str, Tensor]]:
    """Collate documents, `batch_size` at a time; padding is masked everywhere, so its id does not matter.

    Raises:
        ValueError: There are no documents.
    """
    collate, rows = BlockCollator(pad_token_id=0), iter(documents)
    batch = list(islice(rows, batch_size))
    if not batch:
        raise ValueError("documents is empty: pass at least one held-out document.")
    while batch:
        yield {name: value.to(device) for name, value in collate(batch).items()}
        batch = list(islice(rows, batch_size))
