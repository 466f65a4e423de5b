"""Enters namespaces of its own and a file system of a few read-only folders, by the kernel's calls; then the keeper.

What bubblewrap does, for machines without it.
"""

import ctypes
import os
import sys

from . import kernel

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
KEPT = NOEXEC | 1024 | 2048  # flags that an outer namespace may have locked: noexec, noatime, nodiratime,
ST_RELATIME, RELATIME = 4096, 1 << 21  # and relatime, which statvfs and mount number differently
DEVICES = ("null", "zero", "full", "random", "urandom")
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> None:
    """A system call of the C library.

    Raises:
        OSError: It failed.
    """
    converted = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg and arg.encode() for arg in args]
    if getattr(libc, name)(*converted):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}", str(args[:2]))


def enter(argv: list[str]) -> None:
    """Run a command where only some folders are, and an empty /tmp.

    Args:
        argv: The size of /tmp in bytes, places as `bind:source:place` or `link:target:place`, `--`, the command.
    """
    size, places, command = argv[0], argv[1 : argv.index("--")], argv[argv.index("--") + 1 :]
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid:
        call("unshare", spaces | NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    else:
        call("unshare", spaces)
    kernel.prctl(kernel.SET_PDEATHSIG, kernel.SIGKILL)  # after the change of credentials, which clears it
    build_root(size, places)
    child = os.fork()
    if not child:
        inside(command)
    os.closerange(3, 4096)  # the child's pipes have to close when the child ends
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)


def inside(command: list[str]) -> None:
    """The namespaces' first process: its own /proc, a session of its own, then the command."""
    kernel.prctl(kernel.SET_PDEATHSIG, kernel.SIGKILL)
    try:
        call("mount", "proc", "/proc", "proc", NOSUID | NODEV | NOEXEC, None)
        call("umount2", "/old", DETACH)
        call("mount", "none", "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV, None)
        os.chdir("/tmp")
        os.setsid()
        os.execv(command[0], command)
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(1)


def build_root(size: str, places: list[str]) -> None:
    """A new root in memory, with the given folders read-only, a few devices, and an empty /tmp."""
    os.umask(0o022)
    call("mount", "none", "/", None, REC | PRIVATE, None)
    call("mount", "tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", "/tmp", "/tmp/old")
    os.chdir("/")
    for place in places:
        kind, source, target = place.split(":")
        if kind == "link":
            os.symlink(source, target)
        else:
            make_place(target, folder=os.path.isdir("/old" + source))
            call("mount", "/old" + source, target, None, BIND | REC, None)
            held = os.statvfs(target).f_flag
            kept = held & KEPT | (RELATIME if held & ST_RELATIME else 0)
            call("mount", "none", target, None, kept | REMOUNT | BIND | RDONLY | NOSUID | NODEV, None)
    for name in DEVICES:
        make_place(f"/dev/{name}", folder=False)
        call("mount", f"/old/dev/{name}", f"/dev/{name}", None, BIND, None)
    os.mkdir("/proc")
    os.mkdir("/tmp")
    call("mount", "tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={size},mode=1777,nr_inodes=10000")


def make_place(path: str, folder: bool) -> None:
    """An empty folder or file to mount something on."""
    os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    if not folder:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
