"""Runs jobs in processes of their own, several at a time; none outlives the command."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, current_thread, main_thread
from typing import Protocol


class Job(Protocol):
    """What one process does."""

    @property
    def arguments(self) -> list[str]:
        """Of the Python interpreter."""
        ...

    @property
    def log(self) -> Path:
        """The file to which everything goes that the process says."""
        ...

    def ended(self, code: int) -> bool:
        """Told that the process ended with this status; whether it has to run again."""
        ...


class Workers:
    """A queue of jobs and the processes that run them."""

    def __init__(self, jobs: Iterable[Job]):
        self.waiting = deque(jobs)
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = Lock(), False

    def run(self, count: int) -> None:
        """Run all jobs, `count` at a time."""
        environment = dict(os.environ)
        # The processes share the cores; transformers' own tokenizer threads would come on top.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        with _raised(signal.SIGTERM), ThreadPoolExecutor(count) as pool:
            try:
                for future in [pool.submit(self._work, environment) for _ in range(count)]:
                    future.result()
            except BaseException:  # Ctrl-C and SIGTERM among them: no process may outlive the command
                self._stop()
                raise

    def _work(self, environment: dict[str, str]) -> None:
        while (job := self._next()) is not None:
            command = [sys.executable, *job.arguments]
            with open(job.log, "ab") as log:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
                self._running.add(process)
                if self._stopped:  # while this one was being started
                    process.terminate()
                code = process.wait()
                self._running.discard(process)
            if self._stopped:
                return
            if job.ended(code):
                self.waiting.append(job)

    def _next(self) -> Job | None:
        with self._lock:
            return self.waiting.popleft() if self.waiting and not self._stopped else None

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            process.terminate()


@contextmanager
def _raised(number: signal.Signals) -> Iterator[None]:
    """Have a signal end this command by an exception, as Ctrl-C does; a handler of the user's own is left in place."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = current_thread() is main_thread() and signal.getsignal(number) is signal.SIG_DFL
    if ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(number, signal.SIG_DFL)


def last_line(log: Path) -> str:
    """What a process said last: of one that failed, the exception."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
