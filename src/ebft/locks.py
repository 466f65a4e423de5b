"""One command at a time in a folder: a lock that ends with the process that holds it, however that ends."""

from pathlib import Path

from filelock import FileLock, Timeout


def lock(folder: Path, name: str, command: str) -> FileLock:
    """Make a folder and take its lock.

    Args:
        folder: Where.
        name: Of the lock's file.
        command: What has the folder where it is taken, for the message.

    Returns:
        The lock; `release()` gives it back.

    Raises:
        ValueError: The folder cannot be made or written to, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()  # a lock that cannot be written looks taken to filelock
        found = FileLock(folder / name)
        found.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"output_dir='{folder}': another `{command}` is at work there: wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise ValueError(
            f"output_dir='{folder}' cannot be made or written to ({error.strerror}): name one where you may write."
        ) from error
    return found


def is_locked(folder: Path, name: str) -> bool:
    """Whether a process has the folder at this moment."""
    if not (folder / name).exists():
        return False
    try:
        with FileLock(folder / name, timeout=0):
            return False
    except Timeout:
        return True
