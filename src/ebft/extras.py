"""Optional packages: said to be missing before any work, with what installs them."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def require(package: str, extra: str, purpose: str) -> None:
    """Refuse what an optional package is needed for.

    Args:
        package: As it is imported.
        extra: Of ours that brings it.
        purpose: What needs it, for the message.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec(package) is None:
        raise ValueError(f"{purpose} needs {package}, which is not installed: pip install 'ebft[{extra}]'")


def version_of(package: str) -> str | None:
    """The version of a package, by the name it is installed under; None if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
