"""Rows of a benchmark, from a local file or the Hub, each with its place for a message."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Types = type | tuple[type, ...]

_NAMES: dict[type, str] = {
    str: "a string",
    list: "a list",
    int: "a whole number",
    float: "a number",
    dict: "an object",
}


def read_rows(name: str, split: str, config: str | None, field: str, also: str = "") -> list[tuple[str, Row]]:
    """All rows with their places ("problems.jsonl, line 3"); a local path wins over a Hub name.

    Local JSON is not read through `datasets`, which wants all rows to have the same nested types: the inputs of
    EvalPlus have not.

    Args:
        name: A .jsonl, .json (either may end in .gz) or .parquet file, a folder, or a Hub name.
        split: Split to load of a folder or a Hub dataset.
        config: Hub configuration (subset).
        field: The option that `name` comes from, for messages.
        also: What else the caller reads, for messages.

    Raises:
        ValueError: Nothing of that name exists, a line is no JSON object, or there are no rows.
    """
    path = Path(name).expanduser()
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if path.is_file() and suffix in ("jsonl", "json"):
        from ebft.data.loading import json_rows

        rows = list(json_rows(path))
    elif path.is_file() and suffix == "parquet":
        rows = list(_parquet_rows(path))
    elif path.is_file():
        kinds = f"{also}.jsonl, .json (each may end in .gz) or .parquet"
        raise ValueError(f"{field}={name!r} is no {kinds} file: convert it")
    else:
        from ebft.data.loading import load_documents

        documents = load_documents(name, split=split, config=config, field=field)
        rows = [(f"{name}, row {index}", dict(row)) for index, row in enumerate(documents)]
    if not rows:
        raise ValueError(f"{field}={name!r} holds no rows: add some")
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {type(row).__name__} where an object is expected: correct or remove it")
    return rows


def value_of(row: Row, place: str, column: str, types: Types) -> Any:
    """A row's value in a column that it must have.

    Raises:
        ValueError: The column is missing, or its value has another type; names the place and the column.
    """
    if column not in row:
        raise ValueError(f"{place}: the field `{column}` is missing (there are {sorted(row)}): add it")
    types = types if isinstance(types, tuple) else (types,)
    value = row[column]
    # True is an int to Python, and no number to anybody else.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{place}: the field `{column}` is {_kind(value)}: make it {_wanted(types)}")
    return value


def text_of(row: Row, place: str, column: str) -> str:
    """A string that must be there and hold more than white space.

    Raises:
        ValueError: as of `value_of`, or it is blank.
    """
    value = value_of(row, place, column, str)
    if not value.strip():
        raise ValueError(f"{place}: the field `{column}` is blank: fill it in, or remove the row")
    return value


def strings_of(row: Row, place: str, column: str) -> tuple[str, ...]:
    """A list of strings that must be there; it may be empty.

    Raises:
        ValueError: as of `value_of`, or an element is no string.
    """
    values = value_of(row, place, column, list)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{place}: element {index} of the field `{column}` is {_kind(value)}: make it a string")
    return tuple(values)


def one_of(value: str, names: Mapping[str, str], place: str, column: str) -> str:
    """What a name stands for.

    Raises:
        ValueError: It is none of `names`.
    """
    if value not in names:
        raise ValueError(f"{place}: the field `{column}` is {value!r}, not one of {', '.join(sorted(names))}")
    return names[value]


def given(row: Row, column: str) -> bool:
    """Whether a row has a column with a value; columns that a row lacks come as null from Parquet and the Hub."""
    return row.get(column) is not None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no whole Parquet file ({error}): save it again") from error
    yield from ((f"{path}, row {index}", row) for index, row in enumerate(table.to_pylist()))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return type(value).__name__


def _wanted(types: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(_NAMES[wanted] for wanted in types))
