"""Any other task, through lm-evaluation-harness on a saved checkpoint."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..credentials import place_of
from ..extras import require


class TaskScore(NamedTuple):
    """One metric of one task.

    Attributes:
        task: The harness' name of the task or group.
        metric: The harness' name of the metric; its filter behind a comma, if it has one ("exact_match,strict-match").
        value: The result.
        stderr: Its standard error; None where the harness has none.
        values: Of each example, in the task's order, where `value` is their mean; else None.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    values: list[float] | None = None


@cache
def _manager() -> Any:
    """The harness's TaskManager; it reads the YAMLs of thousands of tasks, so one serves all tasks and models."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager()


def _manager_of(include_path: str | Path) -> Any:
    """One that knows a folder's tasks too, which may have changed since the last call."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=str(include_path))


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Refuse unknown tasks before any work.

    Returns:
        The harness's TaskManager.

    Raises:
        ValueError: There are no tasks, the harness does not know one, or it is not installed.
    """
    if not tasks:
        raise ValueError("tasks is empty: name at least one, such as hellaswag.")
    require("lm_eval", "lm-eval", "--tasks")
    manager = _manager() if include_path is None else _manager_of(include_path)
    unknown = [task for task in tasks if not Path(task).is_file() and not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"tasks: lm-evaluation-harness does not know {unknown}: `lm-eval ls tasks` lists all it knows."
        )
    return manager


def expand_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> list[str]:
    """Names of tasks, with patterns such as `arc_*` written out; each once, in order.

    A pattern stands for tasks and not for the groups and tags among its matches: those are made of the same tasks.

    Raises:
        ValueError: As `check_tasks`; or a pattern matches nothing but groups.
    """
    manager = check_tasks(tasks, include_path)
    found: dict[str, None] = {}
    for task in tasks:
        names = [task]
        if not Path(task).is_file() and task not in manager.all_tasks:
            names = [name for name in manager.match_tasks([task]) if name in manager.all_subtasks]
        if not names:
            groups = manager.match_tasks([task])
            raise ValueError(f"tasks: {task!r} matches only groups of tasks: name {groups} in full.")
        found |= dict.fromkeys(names)
    return list(found)


def check_loadable(task: str, include_path: str | Path | None = None) -> None:
    """Load a task with its data, as a run will, so that what is wrong with it is known before any work.

    Args:
        task: A name or the path of a YAML.
        include_path: A folder with more task YAMLs.

    Raises:
        ValueError: It cannot be loaded, or would run generated code.
    """
    manager = check_tasks([task], include_path)
    entry = manager.task_index.get(task)
    # Told from the YAML where it can be: the harness's own code tasks run programs already when they are loaded.
    unsafe = [task] if entry is not None and (entry.cfg or {}).get("unsafe_code") else []
    if not unsafe:
        try:
            loaded = manager.load([task])["tasks"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise ValueError(f"tasks: {task!r} cannot be loaded ({type(error).__name__}: {error}).") from error
        unsafe = [name for name, of in loaded.items() if getattr(of, "UNSAFE_CODE", False)]
    if unsafe:
        raise ValueError(
            f"tasks: {unsafe} run generated code on this machine, without our sandbox: use --code_benchmark, or "
            "run_tasks(..., confirm_run_unsafe_code=True) from Python."
        )


def task_digest(path: str | Path) -> str:
    """Of a task's YAML and of what it names: YAMLs it includes, Python files of its functions, data on this machine.

    By content, for these files are small and often touched without being changed. Files that only stand beside them do
    not count.
    """
    files: dict[Path, None] = {}
    waiting = [Path(path)]
    while waiting:
        file = waiting.pop().resolve()
        if file in files:
            continue
        files[file] = None
        if file.suffix in (".yaml", ".yml"):
            waiting += _named_files(file)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _named_files(path: Path) -> list[Path]:
    """Files that strings of a YAML name, beside it or from here; `!function utils.f` names utils.py."""
    try:
        tokens = list(yaml.scan(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"tasks: {path}{place_of(error)}: correct it.") from error
    names = [token.value for token in tokens if isinstance(token, yaml.ScalarToken)]
    names += [f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in names]
    # os.path: of a text too long or too odd for a name it says no, where Path raises.
    return [Path(found) for name in names for found in (path.parent / name, name) if os.path.isfile(found)]


def run_tasks(
    model_path: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    dtype: str = "auto",
    include_path: str | Path | None = None,
    seed: int = 0,
    model_args: Mapping[str, str | int | float] | None = None,
    confirm_run_unsafe_code: bool = False,
) -> list[TaskScore]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model_path: Folder of the checkpoint, with its tokeniser, or a Hub name.
        tasks: Names of tasks or groups (`lm-eval ls tasks` lists them), or paths of task YAMLs.
        limit: At most so many documents of each task (below 1: this share), for a try.
        num_fewshot: Examples in the prompt; None for what each task says.
        batch_size: Sequences per forward, or "auto".
        device: Such as "cuda:0"; None for the first GPU, else the CPU.
        dtype: Of the weights; "auto" is the checkpoint's.
        include_path: A folder with more task YAMLs.
        seed: Of everything that is drawn.
        model_args: More arguments of the harness' `hf` model, such as `trust_remote_code` or `peft`.
        confirm_run_unsafe_code: Let tasks run generated code on this machine, without our sandbox.

    Returns:
        All metrics of all tasks, in the order of the harness.

    Raises:
        ValueError: There are no tasks, the harness does not know one, or it is not installed.
    """
    manager = check_tasks(tasks, include_path)
    import lm_eval  # pyright: ignore[reportMissingImports]

    results: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_path), "dtype": dtype, **(model_args or {})},
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        task_manager=manager,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    # None comes on all ranks but the first.
    return scores_of(results["results"], results["samples"]) if results else []


def scores_of(
    results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[TaskScore]:
    """Rows of the harness' `results`: task -> "metric,filter" -> value, with "metric_stderr,filter" beside it.

    Its `samples` hold each example's own value of a metric, once per filter.
    """
    rows = []
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            name = metric if filtered == "none" else key
            stderr = values.get(f"{metric}_stderr,{filtered}")
            if not isinstance(stderr, int | float) or not math.isfinite(stderr):
                stderr = None  # the harness writes "N/A"
            own = [sample for sample in samples.get(task, ()) if sample["filter"] == filtered]
            rows.append(TaskScore(task, name, float(value), stderr, _values(own, metric, float(value))))
    return rows


def _values(samples: Sequence[Mapping[str, Any]], metric: str, mean: float) -> list[float] | None:
    """The metric of each example, if it is a number whose mean is the task's: not so of BLEU or perplexity."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    values = [sample.get(metric) for sample in ordered]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    numbers = [float(value) for value in values if value is not None]
    return numbers if math.isclose(sum(numbers) / len(numbers), mean, abs_tol=1e-9) else None
