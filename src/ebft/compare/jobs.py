"""What `compare` does in other processes: training a cell, and measuring one model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.report import is_at_work
from .cell_process import BUSY
from .cells import LOG, Cell
from .workers import last_line

PATIENCE = 2.0  # seconds before a cell that another command has is looked at again
EVALUATE = "evaluate.yaml"


@dataclass(frozen=True)
class Training:
    """Training a cell, and measuring it on the validation data.

    Attributes:
        cell: What to run.
        validation: The file with the options of its measurements.
        on_change: Told of every cell whose status changed.
    """

    cell: Cell
    validation: Path
    on_change: Callable[[Cell], object]

    @property
    def arguments(self) -> list[str]:
        """See `Job`."""
        return ["-m", "ebft.compare.cell_process", str(self.cell.folder), str(self.validation)]

    @property
    def log(self) -> Path:
        """See `Job`."""
        return self.cell.folder / LOG

    def ended(self, code: int) -> bool:
        """A cell of which another command is at work is looked at again; one that failed says why."""
        if code == BUSY:
            time.sleep(PATIENCE)
            if self.cell.status()["status"] not in ("done", "failed"):
                return True
        elif code:
            said = f"killed by signal {-code}" if code < 0 else last_line(self.log)
            self.cell.set_status("failed", error=said or f"ended with status {code}")
        self.on_change(self.cell)
        return False


@dataclass(frozen=True)
class Measurement:
    """`ebft evaluate` of one model.

    Attributes:
        folder: Of its numbers, with its options in `evaluate.yaml`.
        on_end: Told when it is over.
    """

    folder: Path
    on_end: Callable[[], object]

    @property
    def arguments(self) -> list[str]:
        """See `Job`."""
        return ["-m", "ebft", "evaluate", "--config", str(self.folder / EVALUATE)]

    @property
    def log(self) -> Path:
        """See `Job`."""
        return self.folder / LOG

    def ended(self, code: int) -> bool:
        """Waits for a killed command's process that is still at it; any other failure shows when numbers are read."""
        if code and is_at_work(self.folder):
            time.sleep(PATIENCE)
            return True
        self.on_end()
        return False
