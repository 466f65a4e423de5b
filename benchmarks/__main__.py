"""Command line of the benchmark: `python -m benchmarks [options]`."""

import argparse
import datetime
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

# The profiler behind the peaks of memory talks otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from rich.console import Console
from transformers.utils import logging

from benchmarks import plot, report
from benchmarks.arms import ARMS, Bench, Options
from benchmarks.counts import memory_note
from benchmarks.shapes import MODELS, SETTINGS, Workload
from benchmarks.timing import Bar, Case, measure, warm_up
from ebft.extras import require

SWEEPS = {
    "max_length": [256, 512, 1024, 2048, 4096],
    "num_generations": [2, 4, 8],
    "completion_length": [2, 4, 8, 16],
    "stride": [4, 8, 16, 32],
}
SIZES = ("max_length", "context_length", "stride", "completion_length", "num_generations")


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="One update of the published scheme, of ours and of SFT: seconds by stage, memory, ratios.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    p.add_argument("--model", default="tiny", choices=MODELS, help="shape; weights are random, nothing is downloaded")
    p.add_argument("--vocab", type=int, help="another size of the vocabulary")
    p.add_argument(
        "--setting", nargs="+", default=["qa"], choices=SETTINGS, help="block sizes of the paper's settings"
    )
    for name in SIZES:
        p.add_argument(
            f"--{name}", type=int, help="in place of the setting's", default=1024 if name == "max_length" else None
        )
    p.add_argument("--batch", type=int, default=4, help="documents of an update")
    p.add_argument("--micro_batch", type=int, default=1, help="documents at a time, in every stage")
    p.add_argument("--generation_batch", type=int, default=1, help="documents that ours samples at a time, or more")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: under autocast")
    p.add_argument("--attn_implementation", default="sdpa", help="of ours; published and SFT take sdpa")
    p.add_argument("--liger", action="store_true", help="Liger's norms, MLPs and rotary embedding, in all arms")
    p.add_argument("--compile", action="store_true", help="torch.compile of norms and MLPs, in all arms")
    p.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 is full fine-tuning")
    p.add_argument("--gradient_checkpointing", action="store_true", help="in all arms")
    p.add_argument("--offload", action="store_true", help="what checkpointing keeps, to the CPU's memory; ours alone")
    p.add_argument("--threads", type=int, help="of torch on the CPU")
    p.add_argument("--repeats", type=int, default=3, help="timed updates per arm")
    p.add_argument("--warmup", type=int, default=1, help="untimed passes over one micro-batch")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="what to measure")
    p.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="SIZE[=A,B,...]",
        help=f"cost against sizes, in the first setting: {', '.join(SWEEPS)}",
    )
    p.add_argument(
        "--sweep_documents", type=int, help="of an update in the sweeps, all at a time; micro_batch by default"
    )
    p.add_argument("--sweep_arms", nargs="+", default=["ours"], choices=ARMS, help="arms of the sweeps")
    p.add_argument("--seed", type=int, default=0, help="of weights, documents and noise")
    p.add_argument("--output", type=Path, help="folder, by default runs/benchmarks/<time>")
    return p


def read_options(args: argparse.Namespace) -> Options:
    """Check what the machine can do.

    Raises:
        ValueError: The device is not there, or a number is out of range.
    """
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(f"device={args.device} is unknown: use cpu, cuda or cuda:0.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={args.device}: memory and rate are measured on cpu and cuda only.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={args.device} is not available: torch sees {torch.cuda.device_count()} GPUs.")
    if args.gradient_checkpointing:
        for name in ("arms", "sweep_arms"):
            kept = [arm for arm in getattr(args, name) if arm != "ours_reused"]
            if not kept:
                raise ValueError(
                    f"{name}=ours_reused keeps what gradient_checkpointing would not: use one of the two."
                )
            setattr(args, name, kept)
    for name, least in (("repeats", 1), ("warmup", 1), ("lora", 0), ("vocab", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)} must be at least {least}.")
    if args.liger:
        require("liger_kernel", "liger", "--liger")
    if args.liger and args.compile:
        raise ValueError("liger and compile fuse the same operations: use one of the two.")
    if args.offload and (device.type == "cpu" or not args.gradient_checkpointing):
        raise ValueError("offload moves what gradient_checkpointing keeps on a GPU: add it, and device=cuda.")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads={args.threads} must be at least 1.")
        torch.set_num_threads(args.threads)
    return Options(
        model=args.model,
        vocab=args.vocab,
        device=device,
        dtype=getattr(torch, args.dtype),
        attention=args.attn_implementation,
        lora=args.lora,
        checkpointing=args.gradient_checkpointing,
        liger=args.liger,
        compiled=args.compile,
        offloading=args.offload,
        seed=args.seed,
    )


def read_workloads(args: argparse.Namespace) -> dict[str, Workload]:
    """The settings, with what was given explicitly."""
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    sizes = given | {"batch": args.batch, "micro_batch": args.micro_batch, "generation_batch": args.generation_batch}
    return {name: Workload(**(SETTINGS[name] | sizes)) for name in args.setting}


def read_sweeps(texts: list[str], base: Workload, documents: int | None = None) -> dict[str, list[Workload]]:
    """`max_length` or `max_length=256,512` to the workloads of each sweep; of one micro-batch, or so many documents.

    Raises:
        ValueError: An unknown size, or a value that is none.
    """
    documents = documents or base.micro_batch
    base, sweeps = replace(base, batch=documents, micro_batch=documents), {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in SIZES:
            raise ValueError(f"sweep={name} is unknown: use one of {', '.join(SIZES)}.")
        if values and not all(value.isdigit() for value in values.split(",")):
            raise ValueError(f"sweep={text}: write whole numbers, for instance {name}=2,4,8.")
        numbers = [int(value) for value in values.split(",")] if values else SWEEPS.get(name)
        if not numbers:
            raise ValueError(f"sweep={name} has no values of its own: write {name}=2,4,8.")
        sweeps[name] = [replace(base, **{name: number}) for number in numbers]
    return sweeps


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    p = parser()
    args = p.parse_args(argv)
    logging.set_verbosity_error()
    try:
        options, workloads = read_options(args), read_workloads(args)
        sweeps = read_sweeps(args.sweep, next(iter(workloads.values())), args.sweep_documents)
        longest = max(w.max_length for points in (workloads.values(), *sweeps.values()) for w in points)
        bench = Bench(options, longest)
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        output = args.output or Path("runs/benchmarks") / stamp
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    if not plot.can_plot():
        print("matplotlib is not installed: no plot (pip install matplotlib).", file=sys.stderr)
    cases = [Case(group, arm, workload) for group, workload in workloads.items() for arm in ARMS if arm in args.arms]
    swept = {
        name: [Case(f"{name}={getattr(w, name)}", arm, w) for w in points for arm in ARMS if arm in args.sweep_arms]
        for name, points in sweeps.items()
    }
    every = [*cases, *(case for points in swept.values() for case in points)]
    bar = Bar(every, bench, args.warmup, args.repeats)
    with bar.progress:
        for note in filter(None, (memory_note(case.arm, case.workload, bench) for case in every)):
            bar.note(note)
        cases = warm_up(cases, bench, bar, peaks=True)
        rates = measure(cases, bench, args.repeats, bar)
        for name, points in swept.items():
            swept[name] = warm_up(points, bench, bar, peaks=False)
            rates += measure(swept[name], bench, args.repeats, bar)
    if not any(case.seconds for case in every):
        sys.exit("Nothing fitted into memory, so nothing was measured.")
    write(output, bench, cases, swept, rates)


def write(output: Path, bench: Bench, cases: list[Case], swept: dict[str, list[Case]], rates) -> None:
    """Tables, JSON, plot, CSV."""
    rate, environment = statistics.median(rates), report.environment(bench.options)
    rows = [row for case in cases for row in report.rows_of(case, bench, rate)]
    sweeps = {name: [row for c in found for row in report.rows_of(c, bench, rate)] for name, found in swept.items()}
    sweep_rows = [row for found in sweeps.values() for row in found]
    ratios = []
    for group in dict.fromkeys(case.group for case in cases):
        ratios += report.ratios_of(group, {case.arm: case for case in cases if case.group == group}, bench)

    console = Console(record=True, width=None if sys.stdout.isatty() else 130)
    totals = [row for row in sweep_rows if row["stage"] == "total"]
    report.print_tables([*rows, *totals], ratios, rate, environment, console)
    console.save_text(str(output / "tables.txt"))
    options = report.settings(bench.options)
    content = {
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "environment": environment,
        "options": options,
        "matrix_rates": rates,
        "rows": rows,
        "ratios": ratios,
        "sweeps": sweep_rows,
        "seconds": {f"{c.group}/{c.arm}": c.seconds for found in (cases, *swept.values()) for c in found},
    }
    report.write_json(output / "run.json", content)
    if plot.can_plot():
        curves = {name: [row for row in found if row["stage"] == "total"] for name, found in sweeps.items()}
        plot.draw(output / "cost.png", rows, curves)
    report.write_csv(output / "results.csv", [*rows, *sweep_rows], options | environment | {"matrix_rate": rate})
    console.print(f"Written to {output}", highlight=False)


if __name__ == "__main__":
    main()
