"""Ways to shut a process in, the strongest first, and which of them this machine has."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .program import Limits, available_languages

INSIDE = "/sandbox"  # where the harness lies inside
HARNESS = Path(__file__).parent
LINKS = ("/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
# Users that Debian keeps for purposes like this; one per run, since the kernel counts processes per user.
NOBODIES = range(60000, 65000)


@dataclass(frozen=True)
class Layer:
    """A way to start the keeper.

    Attributes:
        name: What it is called.
        description: One line for the user: what protects.
        prefix: The command before the keeper's own, for limits.
        pid_namespace: Whether the kernel ends all processes with the first.
        own_user: Whether to turn into a user of its own (possible for root), or None to remain who one is.
        own_count: Whether the kernel counts a sandbox's processes apart from others of the same user.
    """

    name: str
    description: str
    prefix: Callable[[Limits], list[str]]
    pid_namespace: bool
    own_user: bool
    own_count: bool

    def uid(self) -> int | None:
        """The user that a run turns into, None for none."""
        return random.SystemRandom().choice(NOBODIES) if self.own_user else None

    def command(self, limits: Limits, job_fd: int, verdict_fd: int) -> list[str]:
        """What to execute."""
        return [
            *self.prefix(limits),
            *harness(INSIDE if self.pid_namespace else str(HARNESS), "keeper", job_fd, verdict_fd),
        ]


def harness(folder: str, module: str, *fds: int) -> list[str]:
    """The command of a module of `inside`; `-S` leaves out what was installed, and most of the time to start."""
    function = "main" if module == "keeper" else "enter"
    arguments = ", ".join(map(str, fds)) or "sys.argv[1:]"
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); from inside.{module} import {function}; del sys.path[0]; "
        f"{function}({arguments})"
    )
    return [available_languages()["python"], "-I", "-S", "-B", "-c", code]


def visible() -> list[tuple[str, str, str]]:
    """What programs see of this machine's files, as (bind or link, source, place)."""
    found = [("bind", "/usr", "/usr")]
    for path in LINKS:
        if os.path.islink(path):
            found.append(("link", os.readlink(path), path))
        elif os.path.isdir(path):
            found.append(("bind", path, path))
    prefixes = [os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)]
    prefixes += [str(Path(path).parents[1]) for path in available_languages().values()]
    for prefix in dict.fromkeys(prefixes):
        if prefix != "/" and not Path(prefix).is_relative_to("/usr"):
            found.append(("bind", prefix, prefix))
    if os.path.exists("/etc/ld.so.cache"):
        found.append(("bind", "/etc/ld.so.cache", "/etc/ld.so.cache"))
    return found + [("bind", str(HARNESS / "inside"), f"{INSIDE}/inside")]


def bubblewrap() -> Layer:
    """Namespaces by bubblewrap (0.7 or later, the first that can limit the size of a folder in memory)."""
    program = shutil.which("bwrap") or "bwrap"

    def prefix(limits: Limits) -> list[str]:
        flags = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--as-pid-1"]
        flags += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        if os.getuid():
            flags += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        else:  # the keeper needs them to turn into a user of its own, and loses them with that
            flags += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        for kind, source, place in visible():
            for parent in reversed(
                Path(place).parents[:-1]
            ):  # those that bubblewrap makes itself are its user's alone
                flags += ["--perms", "0755", "--dir", str(parent)]
            flags += ["--symlink" if kind == "link" else "--ro-bind", source, place]
        flags += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        flags += ["--perms", "1777", "--size", str(limits.file_mib << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]
        return [program, *flags, "--chdir", "/tmp", "--"]

    return Layer(
        "bubblewrap",
        "bubblewrap: own process, network and user namespaces; only /usr and the interpreters are visible, read-only",
        prefix,
        pid_namespace=True,
        own_user=not os.getuid(),
        own_count=not os.getuid() or counts_per_namespace(),
    )


def namespaces() -> Layer:
    """The same namespaces by the kernel's own calls."""

    def prefix(limits: Limits) -> list[str]:
        places = [":".join(place) for place in visible()]
        return [*harness(str(HARNESS), "enter"), str(limits.file_mib << 20), *places, "--"]

    return Layer(
        "namespaces",
        "kernel namespaces: own processes, network and user; only /usr and the interpreters are visible, read-only",
        prefix,
        pid_namespace=True,
        own_user=not os.getuid(),
        own_count=not os.getuid() or counts_per_namespace(),
    )


def weak() -> Layer:
    """Limits on resources and nothing else; root becomes another user first, for the kernel limits root in nothing."""
    return Layer(
        "weak",
        "resource limits only: programs can read and change what their user may, and use the network",
        lambda limits: [],
        pid_namespace=False,
        own_user=not os.getuid(),
        own_count=not os.getuid(),
    )


def counts_per_namespace() -> bool:
    """Whether the kernel limits processes per user and namespace, as Linux does from 5.14 on."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)) or 0)) >= (5, 14)


LAYERS = {"bubblewrap": bubblewrap, "namespaces": namespaces, "weak": weak}  # the strongest first
