"""Trains and measures one cell, in a process of its own: `python -m ebft.compare.cell_process FOLDER VALIDATION.yaml`.

Whatever goes wrong stays in this process.
"""

import argparse
import sys
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from ..checkpoints import whole_checkpoints
from .cells import LOCK, STATUS, TRAIN, Cell

BUSY = 75  # exit status where another process has the cell (EX_TEMPFAIL)
# Of a checkpoint, what only a resume needs: no longer wanted when the cell is done.
ONLY_FOR_RESUME = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "training_args.bin")


def main() -> int:
    """Run the cell that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m ebft.compare.cell_process", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("validation", type=Path)
    words = parser.parse_args()
    try:
        with FileLock(words.folder / LOCK, timeout=0):
            return run(read(words.folder), words.validation)
    except Timeout:
        return BUSY


def read(folder: Path) -> Cell:
    """A cell from its folder, to which its status and options were written."""
    status = yaml.safe_load((folder / STATUS).read_text(encoding="utf-8"))
    options = yaml.safe_load((folder / TRAIN).read_text(encoding="utf-8"))
    digests = {name: status.get(name) for name in ("data", "validation")}
    return Cell(status["method"], status["setting"], status["seed"], options, folder, **digests)


def run(cell: Cell, validation: Path) -> int:
    """Train, unless that is done, and measure the checkpoints."""
    if cell.status()["status"] == "done":  # by another command, since this one looked
        return 0
    cell.set_status("running")
    train(cell)
    measure(cell, validation)
    cell.set_status("done")  # first: slim, its checkpoints are other models to `ebft evaluate`
    slim(cell)
    return 0


def train(cell: Cell) -> None:
    """What `ebft train --config train.yaml` does, from the last checkpoint if there is one."""
    from ebft.cli.train import run as train_command

    if cell.is_trained():
        return
    train_command(["--config", str(cell.folder / TRAIN), "--resume_from_checkpoint", "auto"])


def measure(cell: Cell, validation: Path) -> None:
    """What `ebft evaluate` does, of all checkpoints."""
    from rich.console import Console

    from ..evaluation import EvaluationConfig, evaluate

    options = yaml.safe_load(validation.read_text(encoding="utf-8"))
    models = list(dict.fromkeys(map(str, cell.checkpoints())))  # one slow update may end two parts
    where = {"output_dir": str(cell.folder / "validation"), "plots": False}
    evaluate(EvaluationConfig(model_name_or_path=models, **where, **options), Console(width=120))


def slim(cell: Cell) -> None:
    """Remove what only a resume needs."""
    for path in whole_checkpoints(cell.folder):
        for pattern in ONLY_FOR_RESUME:
            for file in path.glob(pattern):
                file.unlink()


if __name__ == "__main__":
    sys.exit(main())
