"""Any other task, through lm-evaluation-harness on a saved checkpoint."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Refuse unknown tasks before any work.

    Returns:
        The harness's TaskManager.

    Raises:
        ValueError: There are no tasks, or the harness does not know one.
        ImportError: lm-evaluation-harness is not installed.
    """
    if not tasks:
        raise ValueError("tasks is empty: name at least one, such as hellaswag.")
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("`tasks` need lm-evaluation-harness: pip install 'ebft[lm-eval]'") from error
    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    unknown = [task for task in tasks if not Path(task).is_file() and not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"tasks: lm-evaluation-harness does not know {unknown}: `lm-eval ls tasks` lists all it knows."
        )
    return manager


def expand_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> list[str]:
    """Names of tasks, with patterns such as `arc_*` written out; each once, in order.

    Raises:
        ValueError: As `check_tasks`.
        ImportError: Likewise.
    """
    manager = check_tasks(tasks, include_path)
    found = [[task] if Path(task).is_file() else sorted(manager.match_tasks([task])) for task in tasks]
    return list(dict.fromkeys(name for names in found for name in names))


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
        ValueError: There are no tasks, or the harness does not know one.
        ImportError: lm-evaluation-harness is not installed.
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
