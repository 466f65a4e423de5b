"""Runs cells in processes of their own, several at a time; other commands may work on the same folder."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from .cell_process import BUSY
from .cells import LOG, Cell

PATIENCE = 2.0  # seconds before a cell that another command has is looked at again


class Workers:
    """A queue of cells and the processes that run them.

    Args:
        cells: What to run; those that are done are left alone.
        validation: The file with the options of their measurements.
        on_change: Told of every cell whose status changed.
    """

    def __init__(self, cells: Sequence[Cell], validation: Path, on_change: Callable[[Cell], object]):
        self.waiting = deque(cell for cell in cells if cell.status()["status"] != "done")
        self.validation, self.on_change = validation, on_change
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = Lock(), False

    def run(self, count: int) -> None:
        """Run all cells, `count` at a time. Ends when each is done or has failed."""
        environment = dict(os.environ)
        # The processes share the cores; transformers' own tokenizer threads would come on top.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        with ThreadPoolExecutor(count) as pool:
            try:
                for future in [pool.submit(self._work, environment) for _ in range(count)]:
                    future.result()
            except BaseException:  # Ctrl-C among them: no process may outlive the command
                self._stop()
                raise

    def _work(self, environment: dict[str, str]) -> None:
        while (cell := self._next()) is not None:
            command = [sys.executable, "-m", "ebft.compare.cell_process", str(cell.folder), str(self.validation)]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
            if self._stopped:
                return
            if code == BUSY:
                time.sleep(PATIENCE)
                if cell.status()["status"] not in ("done", "failed"):
                    self.waiting.append(cell)
            elif code:
                said = f"killed by signal {-code}" if code < 0 else last_line(cell.folder / LOG)
                cell.set_status("failed", error=said or f"ended with status {code}")
            self.on_change(cell)

    def _next(self) -> Cell | None:
        with self._lock:
            return self.waiting.popleft() if self.waiting and not self._stopped else None

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            process.terminate()


def last_line(log: Path) -> str:
    """What a process said last: of one that failed, the exception."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
