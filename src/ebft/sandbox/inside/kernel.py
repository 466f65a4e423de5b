"""What a process gives up before it runs foreign code: privileges, kernel interfaces, resources."""

import ctypes
import os
import resource
import struct

SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, SET_SUBREAPER, SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38  # of prctl
SIGKILL, SIGSTOP = 9, 19  # the module `signal` takes longer to import than most programs run

# Machine -> (AUDIT_ARCH, socket, clone, clone3, refused). Refused is what makes memory that no limit counts
# (memfd_create, shmget, mount, msgget), opens the kernel's riskier parts (bpf, perf, io_uring, keys, userfaultfd,
# nested namespaces), or reaches into other processes.
FILTERS = {
    "x86_64": (
        0xC000003E,
        41,
        56,
        435,
        # memfd_create shmget msgget mount umount2 pivot_root chroot unshare setns bpf perf_event_open
        # io_uring_setup/enter/register add_key request_key keyctl userfaultfd ptrace process_vm_readv/writev
        # open_tree move_mount fsopen fsmount memfd_secret kexec_load init/finit_module pidfd_getfd
        (319, 29, 68, 165, 166, 155, 161, 272, 308, 321, 298, 425, 426, 427, 248, 249, 250, 323, 101, 310, 311)
        + (428, 429, 430, 432, 447, 246, 175, 313, 438),
    ),
    "aarch64": (
        0xC00000B7,
        198,
        220,
        435,
        (279, 194, 186, 40, 39, 41, 51, 97, 268, 280, 241, 425, 426, 427, 217, 218, 219, 282, 117, 270, 271)
        + (428, 429, 430, 432, 447, 104, 105, 273, 438),
    ),
}
SOCKET_FAMILIES = (1, 2, 10)  # unix, IPv4, IPv6; others, such as a virtual machine's, know no network namespaces
NEW_NAMESPACES = 0x7E020000  # clone's flags for namespaces of any kind
EPERM, ENOSYS = 1, 38


def prctl(option: int, value: int, pointer: ctypes.Array | None = None) -> None:
    """The system call of that name.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def limit(limits: dict, processes: int, address_space: bool) -> None:
    """Resource limits of this process and all that it starts; the hard ones, so that nothing raises them again.

    Args:
        limits: Those of the program, by name.
        processes: How many processes and threads this user may have, those of the harness included.
        address_space: Whether memory is limited that way.
    """
    wanted = {
        resource.RLIMIT_NPROC: processes,
        # A little above, for this one tells nobody why it killed.
        resource.RLIMIT_CPU: int(limits["cpu_seconds"]) + 2,
        resource.RLIMIT_FSIZE: limits["file_mib"] << 20,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if address_space:
        wanted[resource.RLIMIT_AS] = limits["memory_mib"] << 20
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def become(uid: int | None) -> None:
    """Turn from root into a user that owns nothing, without a way back."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def shut() -> None:
    """No new privileges, no look into this process from others of the same user, and fewer system calls."""
    prctl(SET_NO_NEW_PRIVS, 1)
    prctl(SET_DUMPABLE, 0)
    program = socket_and_call_filter(os.uname().machine)
    if program:
        buffer = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HL", len(program) // 8, ctypes.addressof(buffer))
        prctl(SET_SECCOMP, 2, ctypes.create_string_buffer(header, len(header)))


def socket_and_call_filter(machine: str) -> bytes:
    """A seccomp program (classic BPF) that refuses what FILTERS names; empty for a machine without a table."""
    if machine not in FILTERS:
        return b""
    architecture, socket, clone, clone3, refused = FILTERS[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, missing = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS
    steps = [
        (load, 0, 0, 4),  # the architecture: 32-bit calls have other numbers, and no program needs them
        (equal, 1, 0, architecture),
        (give, 0, 0, refuse),
        (load, 0, 0, 0),  # the call's number
        (at_least, 0, 1, 0x40000000),  # x32 has other numbers too
        (give, 0, 0, refuse),
        (equal, 0, 1, clone3),  # its flags lie in memory, out of a filter's sight; C libraries then use clone
        (give, 0, 0, missing),
    ]
    for number in refused:
        steps += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    steps += [(equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 0, 1, NEW_NAMESPACES), (give, 0, 0, refuse)]
    steps += [(give, 0, 0, allow)]
    families = [(equal, len(SOCKET_FAMILIES) - i, 0, family) for i, family in enumerate(SOCKET_FAMILIES)]
    steps += [(equal, 0, 2 + len(families), socket), (load, 0, 0, 16), *families, (give, 0, 0, refuse)]
    steps += [(give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
