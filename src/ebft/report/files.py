"""Reads the files a report is made of: what is damaged, half-written or cannot be used is left out."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import yaml

from ..credentials import hidden

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, Any]

LARGEST = 2**53  # of a step, seed or size; a float, as JavaScript's numbers are, tells larger ones no longer apart
# Where a value does not fit its tag, PyYAML lets the errors of its constructors through.
NOT_YAML = (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError)


def read_lines(path: Path) -> Iterator[Record]:
    """The whole records of a file of JSON lines; a running process may just be writing the last one."""
    if leaves_folder(path):
        return
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_whole(record.get("step")):
            yield record


def read_yaml(path: Path) -> Record:
    """A YAML file's mapping, with its keys as text and without secrets; empty if it is missing or not whole."""
    if leaves_folder(path):
        return {}
    try:
        value = yaml.safe_load(path.read_bytes())
    except NOT_YAML:
        return {}
    return hidden({str(key): inner for key, inner in value.items()}) if isinstance(value, dict) else {}


def read_json(path: Path) -> Record:
    """A JSON file's object; empty if it is missing or not whole."""
    if leaves_folder(path):
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_parquet(path: Path) -> "pa.Table | None":
    """A Parquet file's table; None if it is missing or not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if leaves_folder(path):
        return None
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # text that is no UTF-8 would only be found when it is read
    except (OSError, ValueError, pa.ArrowException):
        return None
    return table


def leaves_folder(path: Path) -> bool:
    """Whether a file is a link to one elsewhere: what a folder from outside points to is not for others to see."""
    return path.resolve().parent != path.parent.resolve()


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that a float can hold; True and False are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer that can be a step, a seed or a size."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
