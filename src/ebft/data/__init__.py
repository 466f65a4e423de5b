"""From files and datasets to batches: load, tokenise, pack, collate.

`load_documents` reads a Hub dataset, a local file or a folder; `tokenize_documents` turns its rows into documents with
masks, by TRL's conventions; `pack_documents` puts several of them into one row; `BlockCollator` makes the batch.
"""

from ebft.data.batches import BlockCollator, pack_documents, padding_id
from ebft.data.formats import Format, detect_format, has_prompt
from ebft.data.loading import load_documents
from ebft.data.tokenization import tokenize_documents

__all__ = [
    "BlockCollator",
    "Format",
    "detect_format",
    "has_prompt",
    "load_documents",
    "pack_documents",
    "padding_id",
    "tokenize_documents",
]
