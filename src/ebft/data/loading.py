"""Read a Hub dataset, a local file or a local folder, and name the file and line of what cannot be read."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft.data.formats import FORMAT_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Suffix -> builder of the `datasets` library; each also with .gz behind it, but for Parquet, which compresses itself.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TEXTS = [
    *(".txt", ".md", ".rst", ".tex", ".html", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".java"),
    *(
        ".kt",
        ".scala",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".js",
        ".ts",
        ".jsx",
        ".tsx",
        ".swift",
        ".jl",
        ".lua",
        ".sh",
        ".sql",
    ),
]
_BUILDERS = _TABLES | dict.fromkeys(_TEXTS, "text")

# Column of a format -> its JSON types.
_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "prompt": (str, list),
    "completion": (str, list),
    **dict.fromkeys(("messages", "conversations", "input_ids"), (list,)),
}
_STREAM_CHECKED = 1000  # rows of each local file that are checked before it is streamed


def load_documents(
    name: str,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    field: str = "dataset_name",
) -> "Dataset | IterableDataset":
    """Load a dataset by its Hub name or from local files; a local path wins over a Hub name.

    Tables (.jsonl, .json, .csv, .parquet) keep their columns. A text or source file (.txt, .md, .py, ...) is one
    document, alone or in a folder: one row with the column `text`. All but Parquet may be compressed (.gz). A folder
    holds files of one kind, searched in all its subfolders without the hidden ones. Tables whose names say `test`,
    `validation`, ... form splits of that name, as on the Hub; texts are all in `train`.

    Args:
        name: Hub name, or path of a file or folder.
        split: Split to load, with `datasets`' slices ("train[:1%]"). A single file is the split `train`.
        config: Hub configuration (subset).
        streaming: Return an `IterableDataset`. Local files are then read when they are due, so that errors behind
            the first 1000 rows of a file are not found here.
        field: The option that `name` comes from, for messages.

    Raises:
        ValueError: if nothing of that name exists, the suffix is unknown, files of several kinds or with several
            formats are mixed, a line is no UTF-8 or no JSON object (names file and line), there are no rows, or a
            folder names files outside of it.
    """
    import datasets

    path = Path(name).expanduser()
    source: dict[str, Any] = {"path": name}
    if path.exists():
        source = _local_source(path, field, _STREAM_CHECKED if streaming else None)
    elif looks_like_path(name):
        raise ValueError(
            f"{field}={name!r}: no such file or folder ({path.resolve()}), and not a Hub name either: "
            "correct the path, or pass 'owner/name' for a dataset of the Hub"
        )
    if path.is_dir():
        with _explained(name, split, field):
            builder = datasets.load_dataset_builder(**source, name=config)
        _check_stays_inside(path, builder, field)
    with _explained(name, split, field):
        dataset = datasets.load_dataset(**source, name=config, split=split, streaming=streaming)
        first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{field}={name!r}: split {split!r} holds no rows: add some, or choose another split")
    return dataset


@contextmanager
def _explained(name: str, split: str, field: str) -> Iterator[None]:
    """Around calls of `datasets`: its errors as ValueErrors that name the option."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        yield
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{field}={name!r} is no local file or folder, and the Hub did not give it ({error}): "
            "correct the name, or log in with `hf auth login` if the dataset is private"
        ) from error
    except (DatasetGenerationError, ValueError) as error:
        # `datasets` wraps the error of the row or file that broke it: its cause says more than its own message.
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{field}={name!r}, split={split!r}: {cause} (the split must exist, and all files must be whole and "
            "have the same columns and types)"
        ) from error


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist was meant as a path, so that asking the Hub would only hide the typo."""
    suffixes = (*_TABLES, ".txt", ".gz")  # no others: a Hub name may end in .cpp or .ts
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.lower().endswith(suffixes)


def _check_stays_inside(folder: Path, builder: Any, field: str) -> None:
    """Refuse a folder that names files elsewhere, by links or in its README: what is there is not its author's."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # of the Hub's cache, where files are links to its blobs
        root = root.parent.parent
    for name in (name for files in (builder.config.data_files or {}).values() for name in files):
        if "://" in name or not Path(name).resolve().is_relative_to(root):
            raise ValueError(
                f"{field}={str(folder)!r} names {name}, which is not in that folder (through a link, or the README's "
                "data_files): copy the file into it, or name the file itself"
            )


def _kind(path: Path) -> str | None:
    """Suffix without .gz if it is one of ours, else None."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"] and suffixes[0] != ".parquet":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _BUILDERS else None


def _local_source(path: Path, field: str, limit: int | None) -> dict[str, Any]:
    """Keywords of `load_dataset` for a file or a folder, after a look at what `datasets` would not explain."""
    files = _files_in(path) if path.is_dir() else [path]
    kinds = {kind: file for file in files if (kind := _kind(file))}
    if not kinds:
        found = "holds no file" if path.is_dir() else f"has the suffix {path.suffix!r}, not one"
        raise ValueError(f"{field}={str(path)!r} {found} of a known kind: {', '.join(_BUILDERS)} (or .gz)")
    builders = {_BUILDERS[kind]: file for kind, file in kinds.items()}
    if len(builders) > 1:
        examples = " and ".join(str(file.relative_to(path)) for file in builders.values())
        raise ValueError(f"{field}={str(path)!r} mixes kinds of files ({examples}): pass a folder of one kind")
    (builder,) = builders
    _check(files, builder, limit)
    if builder == "text":
        # utf-8-sig also reads plain UTF-8, and takes a byte order mark for what it is.
        return {"path": "text", "data_files": _paths(files), "sample_by": "document", "encoding": "utf-8-sig"}
    if path.is_dir():
        return {"path": str(path)}  # `datasets` finds the splits
    return {"path": builder, "data_files": _paths(files)}


def _paths(files: list[Path]) -> list[str]:
    """Paths as `load_dataset` takes them: it would read `[` and `*` in a file's name as a pattern."""
    return [glob.escape(str(file)) for file in files]


def _files_in(folder: Path) -> list[Path]:
    """All visible files of a known kind, in a fixed order; a dataset's README.md is no data."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    visible = (file for file in files if not any(part.startswith(".") for part in file.parts))
    return [folder / file for file in sorted(visible) if _kind(file) and file.name != "README.md"]


def _check(files: list[Path], builder: str, limit: int | None) -> None:
    """Stream through the files once: `datasets` names neither the file nor the line of what it cannot read.

    Args:
        files: The files.
        builder: Which builder of `datasets` reads them.
        limit: Look at so many rows of each file; None for all.
    """
    if builder == "parquet":
        return
    if builder == "json":
        rows = _check_json(files, limit)
    else:
        lines = (line for file in files for _, line in islice(numbered_lines(file), limit))
        rows = sum(1 for line in lines if builder == "text" or line.strip())
        rows -= len(files) if builder == "csv" else 0  # the headers
    if rows <= 0:
        raise ValueError(f"{', '.join(map(str, files[:3]))}: no rows in {len(files)} file(s): add some")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their numbers, from 1.

    Raises:
        ValueError: names the file and line that is not UTF-8, or the file that is no gzip file.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}): compress it again") from error


def _check_json(files: Iterable[Path], limit: int | None) -> int:
    """Count the rows; each must be a JSON object, and all must have the same format columns, of the right types.

    Other columns may come and go: `datasets` fills them with nulls.
    """
    first: tuple[str, set[str]] | None = None
    count = 0
    for file in files:
        for place, row in islice(json_rows(file), limit):
            if not isinstance(row, dict):
                raise ValueError(f'{place}: {type(row).__name__} where a row such as {{"text": "..."}} is expected')
            columns = FORMAT_COLUMNS & row.keys()
            first = first or (place, columns)
            count += 1
            if columns != first[1]:
                raise ValueError(
                    f"{place} has the columns {sorted(columns)}, but {first[0]} has {sorted(first[1])}: "
                    "give all rows the same format, or use one file at a time"
                )
            _check_types(row, place)
    return count


def _check_types(row: dict[str, Any], place: str) -> None:
    """The columns of the row's format must hold what the format says; `tokenization` looks at them more closely."""
    formats = (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), ("text",))
    columns = next((columns for columns in formats if row.keys() >= set(columns)), ())
    for column in columns:
        if not isinstance(row[column], _TYPES[column]):
            kind = "null" if row[column] is None else type(row[column]).__name__
            wanted = " or ".join({str: "a string", list: "a list"}[wanted] for wanted in _TYPES[column])
            raise ValueError(f"{place}: `{column}` is {kind}: make it {wanted}, or remove the row")


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with JSON lines, or with one list of objects, each with its place for a message."""
    lines = ((number, line.rstrip()) for number, line in numbered_lines(path) if line.strip())
    for count, (number, line) in enumerate(lines):
        if count == 0 and line.lstrip().startswith("["):
            text = "".join(line for _, line in numbered_lines(path))
            rows = _parse(text, path, 1, f"; line {number} begins a list, which is then the whole file")
            yield from ((f"{path}, row {index}", row) for index, row in enumerate(rows))
            return
        yield f"{path}, line {number}", _parse(line, path, number, "; a file holds one object per line")


def _parse(text: str, path: Path, line: int, hint: str) -> Any:
    """`json.loads` with the file and line in its error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno}: invalid JSON ({error.msg}){hint}: "
            "correct or remove it"
        ) from error
