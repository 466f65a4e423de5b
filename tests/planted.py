"""Secrets planted in the environment, and a search for them in every file that a command left."""

from pathlib import Path

import pyarrow.parquet as pq

SECRET = "s3cr3t0planted"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "TRACKIO_TOKEN", "MY_PASSWORD")


def plant(monkeypatch) -> None:
    """Set the variables that other libraries read tokens from."""
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{SECRET}-{name}")


def files_with_secret(folder: Path) -> list[str]:
    """The files below a folder that hold it; of Parquet, which is compressed, what it decodes to."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert paths, "nothing was written"
    return [str(path.relative_to(folder)) for path in paths if SECRET.encode() in _content(path)]


def _content(path: Path) -> bytes:
    return str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
