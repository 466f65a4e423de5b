"""Figures from measurements: rows per arm and stage, ratios between arms; their tables, CSV and JSON."""

import csv
import datetime
import itertools
import json
import platform
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import ebft
from benchmarks.arms import Bench, Options
from benchmarks.counts import forwards, needed_linear_operations, needed_operations
from benchmarks.timing import Case

MIB = 2**20
Row = dict[str, Any]


def environment(options: Options) -> Row:
    """What a figure depends on beside the sizes."""
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    cuda = options.device.type == "cuda"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": git.stdout.strip(),
        "ebft": ebft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(options.device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def settings(options: Options) -> Row:
    """The options as text and numbers."""
    row = asdict(options)
    return row | {"device": str(options.device), "dtype": str(options.dtype).removeprefix("torch.")}


def rows_of(case: Case, bench: Bench, rate: float) -> list[Row]:
    """One row per stage and one for the whole update; seconds are those of the whole batch."""
    batch, tokens = case.workload.batch, case.workload.batch * case.workload.max_length
    counted = forwards(case.arm, case.workload, bench)
    flops = needed_operations(case.arm, case.workload, bench)
    times = case.seconds | {"total": case.totals}
    peaks: Row = {stage: peak / MIB for stage, peak in case.peaks.items()}
    peaks["total"] = max(peaks.values(), default=None)
    rows = []
    for stage, measured in times.items():
        median = statistics.median(measured)
        row: Row = {
            "group": case.group,
            "arm": case.arm,
            "stage": stage,
            **asdict(case.workload),
            "seconds": median,
            "seconds_min": min(measured),
            "seconds_max": max(measured),
            "repeats": len(measured),
            "tokens_per_second": tokens / median,
            "peak_mib": peaks.get(stage),
            "token_forwards": counted.get(stage),
            "utilisation": batch * flops[stage] / median / rate if stage in flops else None,
            "linear_utilisation": None,
        }
        if stage == "total" and case.arm != "sft":
            row["linear_utilisation"] = (
                batch * needed_linear_operations(case.arm, case.workload, bench) / median / rate
            )
        rows.append(row)
    return rows


def ratios_of(group: str, arms: dict[str, Case], bench: Bench) -> list[Row]:
    """Ratios between the arms of one setting: medians and extremes over the repeats, the counted one beside them."""
    ours, slow, sft, reused = (arms.get(name) for name in ("ours", "published", "sft", "ours_reused"))
    rows: list[Row] = []

    def add(name: str, above: list[float], below: list[float], count: float | None) -> None:
        values = [a / b for a, b in zip(above, below, strict=True)]
        middle, low, high = statistics.median(values), min(values), max(values)
        rows.append(dict(group=group, ratio=name, median=middle, min=low, max=high, counted=count))

    if ours and slow:
        few, many = (forwards(case.arm, case.workload, bench) for case in (ours, slow))
        for stage in ("sampling", "features", "update"):
            add(f"speed-up, {stage}", slow.seconds[stage], ours.seconds[stage], many[stage] / few[stage])
        add("speed-up, whole update, two forwards", slow.totals, ours.totals, many["total"] / few["total"])
        # The release also trains its frozen feature network: forward and backward as one more features stage each.
        extra = [total + 2 * features for total, features in zip(slow.totals, slow.seconds["features"], strict=True)]
        count = (many["total"] + 2 * many["features"]) / few["total"]
        add("speed-up, whole update, two forwards, with the release's own extra passes", extra, ours.totals, count)
        for stage in ours.peaks:
            add(f"peak memory, {stage}", [slow.peaks[stage]], [ours.peaks[stage]], None)
        add("peak memory, largest stage", [max(slow.peaks.values())], [max(ours.peaks.values())], None)
    if reused and slow:
        few, many = (forwards(case.arm, case.workload, bench)["total"] for case in (reused, slow))
        add("speed-up, whole update, reused forward", slow.totals, reused.totals, many / few)
        add("peak memory, reused forward", [max(slow.peaks.values())], [max(reused.peaks.values())], None)
    for case in (ours, reused, slow):
        if case and sft:
            count, floor = (forwards(c.arm, c.workload, bench)["total"] for c in (case, sft))
            add(f"price of {case.arm} / SFT's update", case.totals, sft.totals, count / floor)
    return rows


def print_tables(rows: list[Row], ratios: list[Row], rate: float, env: Row, console: Console) -> None:
    """The two tables of a run."""
    table = Table(title="Seconds per update: median (min..max)", title_justify="left")
    for name in ("", "arm", "stage", "seconds", "tokens/s", "peak MiB", "token-forwards", "MFU", "linear"):
        table.add_column(name, justify="left" if name in ("", "arm", "stage") else "right")
    for row in rows:
        spread = f"{row['seconds']:.3f} ({row['seconds_min']:.3f}..{row['seconds_max']:.3f})"
        shares = [f"{value:.1%}" if value else "" for value in (row["utilisation"], row["linear_utilisation"])]
        count = f"{row['token_forwards']:,.0f}" if row["token_forwards"] else ""
        peak = f"{row['peak_mib']:,.0f}" if row["peak_mib"] else ""
        figures = (f"{row['tokens_per_second']:,.0f}", peak, count, *shares)
        table.add_row(row["group"], row["arm"], row["stage"], spread, *figures, end_section=row["stage"] == "total")
    console.print(table)
    if ratios:
        table = Table(title="Ratios within this run: median (min..max) over repeats", title_justify="left")
        for name in ("", "ratio", "measured", "counted"):
            table.add_column(name, justify="right" if name in ("measured", "counted") else "left")
        for row in ratios:
            spread = f"{row['median']:.2f}"
            spread += f" ({row['min']:.2f}..{row['max']:.2f})" if row["min"] < row["max"] else ""
            table.add_row(row["group"], row["ratio"], spread, f"{row['counted']:.2f}" if row["counted"] else "")
        console.print(table)
    console.print(
        "Peak memory: tensors beyond weights, gradients and optimiser state, of one micro-batch. Token-forwards: "
        "counted, per document. MFU: operations that the result needs (ebft.planning.operations, no checkpointing; "
        "the same for published and ours) over the measured matrix rate, "
        f"{rate / 1e9:,.1f} GFLOP/s (median). Linear: needed token-forwards times 2 operations per weight alone.\n"
        f"{env['machine']}, {env['threads']} threads, torch {env['torch']}, transformers {env['transformers']}, "
        f"commit {env['commit'] or 'unknown'}, {env['date']}",
        highlight=False,
    )


def write_csv(path: Path, rows: list[Row], constant: Row) -> Path:
    """Append one line per row, and to every line what is the same in all: options and environment.

    Returns:
        The file: a new one beside `path` if that has other columns, of another version.
    """
    lines = [row | constant for row in rows]
    columns = list(lines[0])
    for number in itertools.count(2):
        if not path.exists():
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(columns)
        with path.open(newline="", encoding="utf-8") as file:
            if next(csv.reader(file), []) == columns:
                break
        path = path.with_name(f"results_{number}.csv")
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns).writerows(lines)
    return path


def write_json(path: Path, content: Row) -> None:
    """The whole run."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
