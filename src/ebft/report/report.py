"""Reads the runs, computes the figures and tables, and writes the page."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import ebft

from . import panels, tables
from .page import page
from .rollouts import steps_of
from .sources import Sources, read_sources

MOST_ROLLOUTS = 20_000  # embedded in a page: some 5 MB at 8 tokens each


def write_report(
    folders: Sequence[str | Path], output_file: str | Path | None = None, max_rollouts: int = MOST_ROLLOUTS
) -> Path:
    """Write the HTML report of runs, comparisons and evaluations; they may still be running.

    Args:
        folders: Of `ebft train`, `ebft compare` or `ebft evaluate`.
        output_file: Default: report.html, in the folder if it is one, else in the working folder.
        max_rollouts: Most rollouts in the viewer.

    Returns:
        The file written.

    Raises:
        ValueError: A folder cannot be used, or the file not be written.
        ImportError: plotly is not installed.
    """
    sources = read_sources(folders)
    default = Path(folders[0]).expanduser() / "report.html" if len(folders) == 1 else Path("report.html")
    path = default if output_file is None else Path(output_file).expanduser()
    steps, rollouts = [], []
    for about, contexts in steps_of([run for group in sources.groups for run in group.runs], max_rollouts):
        steps.append(about)
        rollouts.append(contexts)
    title = ", ".join(dict.fromkeys(Path(folder).expanduser().resolve().name for folder in folders))
    text = page(f"{title} - ebft report", _data(title, sources, steps), rollouts)
    _write(path, text)
    return path


def _data(title: str, sources: Sources, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": title,
        "made": f"ebft {ebft.__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "groups": [group.name for group in sources.groups],
        "tables": {
            "about": [tables.run_table(sources)],
            "results": [*tables.result_tables(sources), *tables.failure_tables(sources)],
            "metrics": [tables.metric_table(sources)],
            "settings": tables.setting_tables(sources),
        },
        "commands": tables.commands(sources),
        "panels": {
            "training": panels.training_panels(sources),
            "length": panels.length_panels(sources),
            "rewards": panels.reward_panels(sources),
            "cost": panels.cost_panels(sources),
        },
        "steps": steps,
    }


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="ascii")
        os.replace(unfinished, path)
    except OSError as error:
        raise ValueError(
            f"output_file='{path}' cannot be written ({error.strerror}): name a file in a folder where you may write"
        ) from error
