"""Interleaved measurements: every stage of all arms in turn, again and again; peaks of memory apart."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.arms import ARMS, Arm, Bench, Ours
from benchmarks.counts import forwards
from benchmarks.shapes import Workload
from ebft.measuring import matrix_rate, peak_memory, seconds
from ebft.memory_guard import is_out_of_memory

RATES_PER_ROUND = 3


@dataclass(frozen=True, eq=False)
class Case:
    """One arm at one size, and what was measured of it.

    Attributes:
        group: What it is compared within: a setting, or a sweep's name and value.
        arm: One of `arms.ARMS`.
        workload: Sizes.
        seconds: Of each stage, one per repeat.
        peaks: Bytes of tensors each stage holds at most, weights, gradients and optimiser state aside.
    """

    group: str
    arm: str
    workload: Workload
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def totals(self) -> list[float]:
        """Seconds of the whole update, one per repeat."""
        return [sum(stages) for stages in zip(*self.seconds.values(), strict=True)]


class Bar:
    """A progress bar whose unit is a token-forward, so that its time left means something.

    Args:
        cases: All that will be measured.
        bench: What they run on.
        passes: Of a micro-batch before the timing.
        repeats: Of the timing.
    """

    def __init__(self, cases: list[Case], bench: Bench, passes: int, repeats: int):
        self.bench, self.passes = bench, passes
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        total = sum(self._warm_up(case) + repeats * self._stage(case, "total") for case in cases)
        self.task, self.pending = self.progress.add_task("", total=total), 0.0

    def warm_up(self, case: Case) -> None:
        """A case's warm-up begins."""
        self._begin(f"{case.group}: warm-up of {case.arm}", self._warm_up(case))

    def stage(self, case: Case, stage: str) -> None:
        """A case's stage begins."""
        self._begin(f"{case.group}: {stage} of {case.arm}", self._stage(case, stage))

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.progress.console.print(text, highlight=False)

    def _begin(self, text: str, work: float) -> None:
        self.progress.update(self.task, description=text, advance=self.pending)
        self.pending = work

    def _warm_up(self, case: Case) -> float:
        return (self.passes + 1) * case.workload.micro_batch * self._forwards(case)["total"]

    def _stage(self, case: Case, stage: str) -> float:
        return case.workload.batch * self._forwards(case).get(stage, 0.0)

    def _forwards(self, case: Case) -> dict[str, float]:
        return forwards(case.arm, case.workload, self.bench)


def warm_up(cases: list[Case], bench: Bench, bar: Bar, *, peaks: bool) -> list[Case]:
    """Run every case on its first micro-batch; once more, if asked for, to measure its peaks of memory.

    Returns:
        The cases that fit into memory.
    """
    fitting = []
    for case in cases:
        small = replace(case.workload, batch=case.workload.micro_batch)
        arm = ARMS[case.arm](bench, small, keep_gradients=True)
        arm.prepare()
        bar.warm_up(case)
        try:
            for _ in range(bar.passes):
                for run in _stages(arm, case, bench).values():
                    run()
            for stage, run in _stages(arm, case, bench).items() if peaks else ():
                case.peaks[stage] = peak_memory(run, bench.options.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            bar.note(f"{case.group}: {case.arm} runs out of memory and is left out; lower micro_batch.")
            continue
        fitting.append(case)
    return fitting


def _stages(arm: Arm, case: Case, bench: Bench) -> dict[str, Callable[[], Any]]:
    """The stages of a micro-batch; where more documents are sampled at a time, sampling is that of so many."""
    runs: dict[str, Callable[[], Any]] = {stage: getattr(arm, stage) for stage in arm.stages}
    w = case.workload
    if w.generation_batch > w.micro_batch and isinstance(arm, Ours) and "sampling" in runs:
        size = w.generation_batch - w.generation_batch % w.micro_batch
        many = Ours(bench, replace(w, batch=min(w.batch, size)))

        def sampling() -> None:
            many.prepare()
            many.sampling()
            arm.tokens = many.tokens[:1]

        runs["sampling"] = sampling
    return runs


def measure(cases: list[Case], bench: Bench, repeats: int, bar: Bar) -> list[float]:
    """Fill in the seconds of all cases, in turn.

    Returns:
        The machine's matrix rates in between, in floating-point operations per second.
    """
    options = bench.options
    arms = [ARMS[case.arm](bench, case.workload) for case in cases]
    stages = list(dict.fromkeys(stage for arm in arms for stage in arm.stages))
    rates = []
    for _ in range(repeats):
        rates.append(matrix_rate(options.device, options.dtype, RATES_PER_ROUND))
        # The same stage of all arms in a row: whatever else the machine does hits what is compared alike.
        for stage, case, arm in ((s, *pair) for s in stages for pair in zip(cases, arms, strict=True)):
            if stage in arm.stages:
                bar.stage(case, stage)
                arm.prepare()
                case.seconds.setdefault(stage, []).append(seconds(getattr(arm, stage), options.device))
        for arm in arms:
            arm.forget()
    return rates
