"""What a training dataset holds, in a few bytes: noticed when it is another one after a resume."""

import zlib
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

ROWS = 100_000  # of a longer dataset, so many are read, evenly spaced
FIRST_ROWS = 256  # of a stream, whose other rows are not there yet
BATCH = 1000


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Number of rows and CRC-32 of their contents, whatever files, caches or processes they came through.

    Args:
        dataset: A `datasets` Dataset or IterableDataset.

    Returns:
        `rows` (None for a stream), `rows_read` and `crc32`.
    """
    if not hasattr(dataset, "__len__"):
        rows = list(islice(iter(dataset), FIRST_ROWS))
        return {"rows": None, "rows_read": len(rows), "crc32": _crc(pa.Table.from_pylist(rows), 0)}
    count, crc = len(dataset), 0
    if count > ROWS:
        dataset = dataset.select(np.linspace(0, count - 1, ROWS).astype(int))
    for table in dataset.with_format("arrow").iter(BATCH):
        crc = _crc(table, crc)
    return {"rows": count, "rows_read": len(dataset), "crc32": crc}


def _crc(table: pa.Table, crc: int) -> int:
    """The CRC-32 of a table, column by column; integers of any width count alike."""
    for name in sorted(table.column_names):
        crc = zlib.crc32(name.encode(), crc)
        crc = _crc_of_column(table[name].combine_chunks(), crc)
    return crc


def _crc_of_column(column: Any, crc: int) -> int:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = np.array(column.value_lengths().fill_null(-1), dtype=np.int64)
        return _crc_of_column(column.flatten(), zlib.crc32(lengths.tobytes(), crc))
    if pa.types.is_integer(column.type) and not column.null_count:
        return zlib.crc32(column.to_numpy(zero_copy_only=False).astype(np.int64).tobytes(), crc)
    return zlib.crc32(repr(column.to_pylist()).encode(), crc)
