"""Checkpoints that are whole or do not count: marked while written, sealed with a manifest that a resume checks."""

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNFINISHED, MANIFEST = "unfinished", "manifest.json"
SHARDS = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}  # in a checkpoint, what an engine alone reads
# What a name begins with while its step is written anew, while it is deleted, and once an earlier one was resumed.
# With an underscore, as `checkpoint-*` itself, it is not pushed to the Hub.
REPLACED, DELETING, SUPERSEDED = "_replaced-", "_deleting-", "_superseded-"
PIECE = 1 << 22  # bytes read at a time


def step_of(checkpoint: Path) -> int:
    """The optimiser step of a checkpoint, by its name; -1 if it has none."""
    number = checkpoint.name.removeprefix(REPLACED).removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def whole_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints that were written to their end, the earliest first."""
    # Of a step that is being saved once more, the first save counts until the second is whole.
    paths = [path for prefix in (REPLACED, "") for path in folder.glob(f"{prefix}checkpoint-*")]
    found = {step_of(path): path for path in paths if step_of(path) >= 0 and is_whole(path)}
    return [found[step] for step in sorted(found)]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    found = whole_checkpoints(Path(output_dir))
    return str(found[-1]) if found else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; what happened to its files since then is for `check_whole`."""
    if (checkpoint / UNFINISHED).exists():
        return False
    return checkpoint.is_dir() and any(checkpoint.iterdir())  # empty, it was killed before it was marked


def begin(checkpoint: Path) -> None:
    """Mark a checkpoint as unfinished, before anything else is written into it."""
    if checkpoint.exists():
        if is_whole(checkpoint):
            checkpoint.rename(checkpoint.with_name(REPLACED + checkpoint.name))
        else:
            _delete(checkpoint)
    checkpoint.mkdir(parents=True)
    (checkpoint / UNFINISHED).touch()


def files_of(checkpoint: Path) -> list[str]:
    """The files of a checkpoint, relative to it, in the same order on every machine."""
    paths = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in paths if name not in (UNFINISHED, MANIFEST))


def checksums(checkpoint: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and CRC-32 of files, which this call also brings from the system's memory onto the disk."""
    found = {}
    for name in names:
        with open(checkpoint / name, "rb") as file:
            os.fsync(file.fileno())
        found[name] = _size_and_crc(checkpoint / name)
    return found


def _size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return [size, crc]


def seal(checkpoint: Path, files: dict[str, list[int]], about: dict[str, Any]) -> None:
    """Write the manifest and take the mark away: from here on the checkpoint is whole.

    Args:
        checkpoint: Its folder, with all files in it.
        files: What `checksums` says of all of them.
        about: The run's settings and data, which a resume is compared with.
    """
    unfinished = checkpoint / f"{MANIFEST}.unfinished"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({**about, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(checkpoint / MANIFEST)
    (checkpoint / UNFINISHED).unlink()
    for folder in (checkpoint, checkpoint.parent):
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if (replaced := checkpoint.with_name(REPLACED + checkpoint.name)).exists():
        _delete(replaced)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: It is damaged, or not there.
    """
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(_damage(checkpoint, f"{MANIFEST} is missing")) from None
    except (OSError, ValueError) as error:
        raise ValueError(_damage(checkpoint, f"{MANIFEST} cannot be read ({error})")) from error


def check_whole(checkpoint: Path, contents: bool = True) -> None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint: Its folder.
        contents: Read the files, too; else their sizes alone are compared.

    Raises:
        ValueError: It is no whole checkpoint, or damaged, or holds the model alone; the message names the file and
            the next older whole checkpoint.
    """
    if found := last_complete_checkpoint(checkpoint):
        raise ValueError(f"resume_from_checkpoint='{checkpoint}' is a run's folder: name {found}, its newest one.")
    if not is_whole(checkpoint):
        reason = "its writing was cut off" if checkpoint.is_dir() else "there is no such folder"
        raise ValueError(_unusable(checkpoint, f"is not a whole checkpoint: {reason}"))
    manifest = read_manifest(checkpoint)
    if manifest.get("model_only"):
        raise ValueError(
            f"resume_from_checkpoint='{checkpoint}' holds the model without the optimiser (save_only_model: true): no "
            "run can go on from it, but a new one can start with it as model_name_or_path."
        )
    for name, (size, crc) in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(_damage(checkpoint, f"{name} is missing"))
        if path.stat().st_size != size:
            raise ValueError(_damage(checkpoint, f"{name} has {path.stat().st_size:,} bytes of {size:,}"))
        if contents and _size_and_crc(path)[1] != crc:
            raise ValueError(_damage(checkpoint, f"{name} has other contents than when it was written"))


def _damage(checkpoint: Path, what: str) -> str:
    return _unusable(checkpoint, f"is damaged: {what}")


def _unusable(checkpoint: Path, why: str) -> str:
    older = [path for path in whole_checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    remedy = f"resume from the one before it, {older[-1]}" if older else "there is none before it: start a new run"
    return f"resume_from_checkpoint='{checkpoint}' {why}. Nothing was changed; {remedy}."


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest whole checkpoints beyond `limit`, never the newest or the best.

    Args:
        folder: The run's.
        limit: How many to keep; None or 0 keeps all.
        best: The best checkpoint's path, or None.
    """
    whole = whole_checkpoints(folder)
    kept = {whole[-1].name, Path(best).name} if best else {whole[-1].name}
    excess = len(whole) - max(limit, len(kept)) if limit and limit > 0 else 0
    for path in [path for path in whole if path.name not in kept][: max(0, excess)]:
        _delete(path)


def _delete(path: Path) -> None:
    """Under another name, so that half of it is never taken for a whole one."""
    doomed = path.with_name(DELETING + path.name)
    shutil.rmtree(doomed, ignore_errors=True)  # left by a kill
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted; only for the run that has the folder's lock."""
    whole = whole_checkpoints(folder)
    written = [path for prefix in (REPLACED, "") for path in folder.glob(f"{prefix}checkpoint-*")]
    broken = [path for path in written if step_of(path) >= 0 and path not in whole]
    for path in broken:
        _delete(path)
    for path in folder.glob(f"{DELETING}*checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
