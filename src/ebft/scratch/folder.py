"""The output folder of a demonstration, and a screen that belongs to its progress bars."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers


def prepare_folder(folder: Path, overwrite: bool, artifacts: Sequence[str], what: str) -> None:
    """Make room for this run's files.

    Args:
        folder: Where they go; made if it is missing.
        overwrite: Whether those of an earlier run may be removed; other files never are.
        artifacts: What a run writes.
        what: What a run is called, for the message.

    Raises:
        ValueError: The folder holds an earlier run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file: name a folder")
    found = [folder / name for name in artifacts if (folder / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"output_dir={str(folder)!r} holds an earlier {what} ({found[0].name}): delete it, replace it with "
            "--overwrite, or choose another --output_dir"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def quiet() -> None:
    """Leave the screen to our own progress bars, and a small model to few threads."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(min(torch.get_num_threads(), 4))
