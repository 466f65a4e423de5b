"""Tasks of lm-evaluation-harness, on the checkpoint as it is saved."""

from pathlib import Path
from typing import Any

import torch

from ...extras import require, version_of
from ..harness import TaskScore, check_loadable, expand_tasks, run_tasks, task_digest
from ..intervals import DocumentMean
from ..records import RecordFile
from ..summary import Row
from .base import Session, Suite, Turn


class TaskSuite(Suite):
    """The tasks of an evaluation.

    Raises:
        ValueError: The harness is not installed, or does not know a task.
    """

    def __init__(self, session: Session):
        require("lm_eval", "lm-eval", "--tasks")
        self.session, self.config = session, session.config
        self.tasks = expand_tasks(self.config.tasks)
        self.loadable: set[str] = set()
        self.others: list[Row] = []

    def measure(self, turn: Turn) -> dict[str, DocumentMean]:
        """Means over a task's examples, with which models can be paired; what is no such mean comes in `rows`."""
        options, file = self._options, self._file(turn)
        with turn.progress("tasks", len(self.tasks)) as advance:
            for task in self.tasks:
                if task not in file:
                    turn.release()
                    dtype = str(self.session.dtype).removeprefix("torch.")
                    scores = run_tasks(turn.path, [task], device=str(self.session.device), dtype=dtype, **options)
                    file.append([{"id": task, "scores": [score._asdict() for score in scores]}])
                advance(1)
        means = {}
        for score in (TaskScore(**found) for task in self.tasks for found in file.records[task]["scores"]):
            name = f"{score.task}/{score.metric}"
            if score.values is None:
                self.others.append(_row(turn.name, name, score))
            else:
                values = torch.tensor(score.values, dtype=torch.float64)
                means[name] = DocumentMean(values, torch.ones_like(values))
        return means

    def open_records(self, turn: Turn) -> None:
        """Those of the tasks; and refuse tasks that are still to be run and cannot be."""
        file = self._file(turn)
        for task in self.tasks:
            if task not in file and task not in self.loadable:
                check_loadable(task)
                self.loadable.add(task)

    @property
    def _options(self) -> dict[str, Any]:
        return {"limit": self.config.tasks_limit, "seed": self.config.seed}

    def _file(self, turn: Turn) -> RecordFile:
        files = {task: task_digest(task) for task in self.tasks if Path(task).is_file()}
        return turn.records("tasks", self._options | {"lm_eval": version_of("lm_eval"), "files": files}, None)

    def rows(self) -> list[Row]:
        """Scores that are no plain means over examples, with the harness's own standard errors."""
        return self.others


def _row(model: str, measure: str, score: TaskScore) -> Row:
    low = high = None
    if score.stderr is not None:
        low, high = score.value - 1.96 * score.stderr, score.value + 1.96 * score.stderr
    return dict(model=model, measure=measure, length=None, mean=score.value, low=low, high=high)
