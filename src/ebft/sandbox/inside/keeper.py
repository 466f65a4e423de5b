"""The first process of a sandbox: starts the program, watches what it uses, and alone knows how to say that it passed.

Three processes come from one interpreter, each forked before anything is read that the next must not see: this one
(which holds the nonce), the tests, the candidate.
"""

import os
import select
import time

from . import kernel, wire
from .tests_side import SHOWN, Candidate, ending, judge

INTERVAL = 0.02  # seconds between looks at what the program uses
TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
LAST_FD = 4096
HARNESS_PROCESSES = 3


def main(job_fd: int, verdict_fd: int) -> None:
    """Run the program that comes through `job_fd` and answer through `verdict_fd`.

    The first message holds what is needed to start, the second (read when the program's process exists) the nonce,
    code and tests. The answers are "started" and, at the end, a letter of the verdict, a line, and the nonce where it
    passed.
    """
    setup = wire.decode(wire.receive(job_fd), int)
    apart, limits = setup["mode"] == "separate", setup["limits"]
    if not os.getuid() and setup["uid"] is None:
        raise RuntimeError("the kernel does not limit the processes of root")
    kernel.become(setup["uid"])
    kernel.limit(limits, allowed_processes(limits, setup["own_count"]), setup["mode"] != "command")
    kernel.shut()
    kernel.prctl(kernel.SET_PDEATHSIG, kernel.SIGKILL)  # again, for a change of user clears it
    if not setup["pid_namespace"]:
        kernel.prctl(kernel.SET_SUBREAPER, 1)
    program = start(setup)
    job = wire.decode(wire.receive(job_fd), int)
    wire.send(verdict_fd, b"started")
    first = [job["code"]] if not apart else [job["code"], job["tests"], job["entry_point"], job["nonce"]]
    later = [] if apart else [job["tests"], job["entry_point"], job["nonce"]]
    program.messages = b"".join(wire.frame(wire.bytes_of(text)) for text in first)
    program.later = b"".join(wire.frame(wire.bytes_of(text)) for text in later)
    letter, line = watch(program, limits, job["nonce"])
    if not setup["pid_namespace"]:
        sweep()
    wire.send(verdict_fd, wire.encode((letter, line, job["nonce"] if letter == "P" else ""), int))
    os._exit(0)


def allowed_processes(limits: dict, own_count: bool) -> int:
    """What the kernel is told: the program's and this harness's three; and where it counts this user's others too,
    those, with room for other workers to have theirs. It must never be without a limit.
    """
    if own_count:
        return limits["processes"] + HARNESS_PROCESSES
    others = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    others += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # ended meanwhile
    return others + 8 * (limits["processes"] + HARNESS_PROCESSES)


class Started:
    """A program's process and the pipes to it."""

    def __init__(self, pid: int, read_fd: int, write_fd: int, printed_fd: int):
        self.pid, self.read_fd, self.write_fd, self.printed_fd = pid, read_fd, write_fd, printed_fd
        self.messages = b""  # still to be written
        self.later = b""  # to be written when the code has run
        self.received = b""
        self.printed, self.last_printed = 0, b""


def start(setup: dict) -> Started:
    """Fork the program's process, with nothing open but its pipes."""
    to_program, from_program, printed = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        for fd in (to_program[0], from_program[1], printed[1]):
            os.close(fd)
        os.set_blocking(to_program[1], False)
        return Started(pid, from_program[0], to_program[1], printed[0])
    try:
        only([os.open(os.devnull, os.O_RDONLY), printed[1], printed[1], to_program[0], from_program[1]])
        if setup["mode"] == "separate":
            run_apart(3, 4, setup["limits"]["memory_mib"] << 18)
        elif setup["mode"] == "together":
            from .together import judge_together

            judge_together(3, 4)
        else:
            os.execv(setup["command"][0], setup["command"])
    except (OSError, EOFError) as error:
        os.write(2, str(error).encode())
    finally:
        os._exit(1)


def only(fds: list[int]) -> None:
    """Keep these file descriptors as 0, 1, 2, ... in their order, and close all others."""
    high = [fd if fd > len(fds) else os.dup(fd) for fd in fds]
    while any(fd < len(fds) for fd in high):
        high = [os.dup(fd) if fd < len(fds) else fd for fd in high]
    for place, fd in enumerate(high):
        os.dup2(fd, place)
    os.closerange(len(fds), LAST_FD)


def run_apart(read_fd: int, write_fd: int, most: int) -> None:
    """Fork the candidate's process before the tests are read, then run the tests and say how they went."""
    questions, answers = os.pipe(), os.pipe()
    if not os.fork():
        try:
            only([0, 1, 2, questions[0], answers[1]])
            from .candidate_side import serve

            serve(3, 4)
        finally:
            os._exit(1)
    os.close(questions[0])
    os.close(answers[1])
    code, tests, entry_point, nonce = (wire.text_of(wire.receive(read_fd)) for _ in range(4))
    problem = judge(code, tests, entry_point, Candidate(answers[0], questions[1], most))
    wire.send(write_fd, wire.bytes_of(problem or "P" + nonce))


def watch(program: Started, limits: dict, nonce: str) -> tuple[str, str]:
    """Wait for the program's answer, its end, or its going over a limit.

    Returns:
        A letter (P passed, F failed, M out of memory, L timed out, T only in one process) and a line.
    """
    begun = time.monotonic()
    look = begun + INTERVAL
    while True:
        readers = [program.read_fd] if program.printed_fd < 0 else [program.read_fd, program.printed_fd]
        writers = [program.write_fd] if program.messages else []
        readable, writable, _ = select.select(readers, writers, [], INTERVAL)
        if program.printed_fd in readable:
            take_printed(program)
        if program.read_fd in readable:
            answer = take_answer(program, nonce)
            if answer:
                return answer
        if writable:
            hand_over(program)
        if program.printed > limits["output_kib"] << 10:
            return "F", f"more than {limits['output_kib']} KiB of output"
        now = time.monotonic()
        if now - begun > limits["wall_seconds"]:
            return "L", f"more than {limits['wall_seconds']:g} s"
        if now > look:
            over, look = over_a_limit(limits), now + INTERVAL
            if over:
                return over


def hand_over(program: Started) -> None:
    """Write what the program's pipe takes."""
    try:
        written = os.write(program.write_fd, program.messages)
    except BrokenPipeError:
        written = len(program.messages)  # it has ended, which the other pipe will tell
    program.messages = program.messages[written:]


def take_printed(program: Started) -> None:
    """Count what was printed and keep the last of it."""
    data = os.read(program.printed_fd, 1 << 16)
    program.printed += len(data)
    program.last_printed = (program.last_printed + data)[-2048:]
    if not data:
        program.printed_fd = -1


def take_answer(program: Started, nonce: str) -> tuple[str, str] | None:
    """The verdict that the program's process sends or, by its end, leaves behind; None while there is neither."""
    data = os.read(program.read_fd, 1 << 16)
    if not data:
        return ended(program)
    program.received += data
    size = int.from_bytes(program.received[:8], "big")
    if size > 1 << 16:
        return "F", "the program sent something that is no verdict"
    if len(program.received) < 8 + size or len(program.received) < 8:
        return None
    message, program.received = program.received[8 : 8 + size], program.received[8 + size :]
    if message == b"R":
        program.messages, program.later = program.messages + program.later, b""
        return None
    if message == b"P" + nonce.encode():
        return "P", ""
    letter, line = message[:1].decode("ascii", "replace"), message[1:].decode("utf-8", "replace")
    if letter not in ("F", "M", "T"):
        return "F", "the program sent something that is no verdict"
    return letter, " ".join(line.split())[:SHOWN]


def ended(program: Started) -> tuple[str, str]:
    """The verdict on a program that ended without one."""
    while program.printed_fd >= 0 and select.select([program.printed_fd], [], [], 0)[0]:
        take_printed(program)
    os.kill(program.pid, kernel.SIGKILL)  # it may have closed its pipe and stayed
    line = ending(os.waitpid(program.pid, 0)[1])
    if b"heap out of memory" in program.last_printed:
        return "M", "the JavaScript heap is full"
    said = program.last_printed.decode("utf-8", "replace").split()
    return "F", " ".join([line + ":", *said] if said else [line])[:SHOWN]


def over_a_limit(limits: dict) -> tuple[str, str] | None:
    """Whether all processes below this one together use too much."""
    processes = below()
    if sum(cpu for _, cpu, _, _ in processes) > limits["cpu_seconds"]:
        return "L", f"more than {limits['cpu_seconds']:g} s of CPU time"
    if sum(memory for _, _, memory, _ in processes) > limits["memory_mib"] << 20:
        return "M", f"more than {limits['memory_mib']} MiB in all processes together"
    if sum(threads for _, _, _, threads in processes) > limits["processes"] + HARNESS_PROCESSES:
        return "F", f"more than {limits['processes']} processes and threads"
    folder = os.statvfs(".")
    if limits["files"] and folder.f_files - folder.f_ffree > limits["files"]:
        return "F", f"more than {limits['files']} files"
    return None


def below() -> list[tuple[int, float, int, int]]:
    """Process id, CPU seconds, bytes of resident memory and threads of all descendants, the dead that nobody has
    waited for included. Orphans count, for they become children of this process.
    """
    seen, children = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    values = file.read().rpartition(")")[2].split()  # the name before may hold anything
            except OSError:
                continue  # ended meanwhile
            cpu = sum(int(value) for value in values[11:15]) / TICKS
            seen[int(name)] = (int(name), cpu, int(values[21]) * PAGE, int(values[17]))
            children.setdefault(int(values[1]), []).append(int(name))
    found, parents = [], [os.getpid()]
    while parents:
        pids = children.get(parents.pop(), [])
        found += [seen[pid] for pid in pids]
        parents += pids
    return found


def sweep() -> None:
    """Where no pid namespace does it: stop all that is left, so that nothing forks away, then end it."""
    for signal in (kernel.SIGSTOP, kernel.SIGKILL):
        known = set()
        while True:
            pids = {pid for pid, *_ in below()}
            if pids <= known:
                break
            for pid in pids:
                try:
                    os.kill(pid, signal)
                except ProcessLookupError:
                    continue
            known |= pids
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
