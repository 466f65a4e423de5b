"""The folders that a report is of, sorted into comparisons, groups of runs and evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .comparison import Comparison, is_comparison, methods_of, read_comparison
from .files import Record, is_number, read_json
from .runs import Run, is_run, read_run

EVALUATION = "results.json"  # what `ebft evaluate` and the quickstart write
NOT_OF_THE_METHOD = ("output_dir", "seed", "data_seed", "run_name", "logging_dir")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed: one line in a figure.

    Attributes:
        name: Of the line.
        runs: One per seed; none for a method that was only measured, as the base model is.
    """

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Sources:
    """Everything a report is of.

    Attributes:
        groups: The lines of its figures, in order; their places decide the colors.
        comparisons: With the prefix of their groups' names: "" if there is nothing to confuse them with.
        evaluations: The rows of every evaluation found, by the model's name.
        runs: All runs, those of settings that were not selected included.
    """

    groups: list[Group]
    comparisons: list[tuple[str, Comparison]]
    evaluations: dict[str, list[Record]]
    runs: list[Run]


def read_sources(folders: Sequence[str | Path]) -> Sources:
    """Read what `ebft report` was given.

    Raises:
        ValueError: A folder is missing, or is none that a report can be made of.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    for path in paths:
        _check(path)
    names = _short_names(paths)
    groups, comparisons, evaluations, plain, cells = [], [], {}, [], []
    for path, name in zip(paths, names, strict=True):
        if is_comparison(path):
            comparison = read_comparison(path)
            prefix = f"{name}: " if len(paths) > 1 else ""
            comparisons.append((prefix, comparison))
            groups += _groups_of(comparison, prefix)
            cells += [run for run, _ in comparison.cells]
        elif is_run(path):
            plain.append(read_run(path, name))
        for file in (path / EVALUATION, *sorted(path.glob(f"*/{EVALUATION}"))):
            _add_evaluation(evaluations, file)
    groups += _by_seed(plain)
    return Sources(groups, comparisons, evaluations, [*plain, *cells])


def _check(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"RUN='{path}' does not exist: name the output_dir of a run, or the folder of a comparison")
    if not path.is_dir():
        raise ValueError(f"RUN='{path}' is a file: name the folder it is in")
    if not (is_comparison(path) or is_run(path) or (path / EVALUATION).exists()):
        raise ValueError(
            f"RUN='{path}' holds neither resolved_config.yaml, metrics.jsonl nor rollouts (a run of `ebft train`), "
            "compare.yaml (a comparison) or results.json (an evaluation): name a folder that does"
        )


def _short_names(paths: list[Path]) -> list[str]:
    """As many of the last parts of each path as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    raise AssertionError("whole paths tell folders apart")


def _groups_of(comparison: Comparison, prefix: str) -> list[Group]:
    runs = comparison.selected_cells()
    methods = dict.fromkeys([*methods_of(comparison.rows), *(run.method for run in runs)])
    return [Group(f"{prefix}{method}", tuple(r for r in runs if r.method == method)) for method in methods]


def _by_seed(runs: list[Run]) -> list[Group]:
    """Runs with the same settings but for the seed together; a run without settings yet stays alone."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = sorted((k, repr(v)) for k, v in run.settings.items() if k not in NOT_OF_THE_METHOD)
        found.setdefault(repr(settings) if settings else run.name, []).append(run)
    groups = []
    for together in found.values():
        seeds = {run.seed for run in together}
        if len(seeds) < len(together):  # the same seed twice is no second sample
            groups += [Group(run.name, (run,)) for run in together]
            continue
        more = f" and {len(together) - 1} more seeds" if len(together) > 1 else ""
        groups.append(Group(f"{together[0].name}{more}", tuple(together)))
    return groups


def _add_evaluation(evaluations: dict[str, list[Record]], file: Path) -> None:
    rows = read_json(file).get("results")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and is_number(row.get("mean")) and isinstance(row.get("model"), str):
            evaluations.setdefault(row["model"], []).append(row)
