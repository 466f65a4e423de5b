"""Kills runs at random moments and resumes them: `python -m benchmarks.faults --kills 100`.

Tiny runs of each kind ({full, LoRA} x {one process, DDP, FSDP2}, streamed and packed data) are ended by SIGKILL or
SIGTERM, some while a checkpoint or the final model is being written, and go on with `resume_from_checkpoint="auto"`,
as a scheduler's requeue would. What they leave is compared with an unbroken run: final model, weights, optimiser,
random state, metrics and rollouts, to the bit.
The processes are forked from one that has imported everything already, so that a start costs a second.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: a fork has no use for its threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU must not begin with it: its forks could not

import argparse
import contextlib
import json
import random
import selectors
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import TrainerCallback

from benchmarks.tiny_runs import KINDS, processes, trainer
from ebft._compat import around_saving
from ebft.checkpoints import check_whole, last_complete_checkpoint, step_of

STEPS = 24
SETTINGS: dict[str, Any] = dict(
    save_steps=2, save_total_limit=1, eval_strategy="steps", eval_steps=3, rollout_save_steps=2, optim="adamw_torch"
)
PATIENCE = 300  # seconds without any event, after which a start is taken to hang
# What a kill waits for, and how likely it is. Behind the event comes a random share of what usually follows it.
AIMS = {"start": 0.15, "step": 0.25, "saving": 0.3, "writing": 0.3}


@dataclass
class Kill:
    """One kill and what it left.

    Attributes:
        kind: Of run.
        signal: Its name.
        during: What the run was doing: `start`, `step`, `saving`, `evaluation`, or `writing` the final model.
        seconds: From the start of the processes.
        step: The last optimiser step that was done.
        checkpoint: The step the run goes on from.
        status: Exit statuses of the processes.
    """

    kind: str
    signal: str
    during: str
    seconds: float
    step: int
    checkpoint: int
    status: list[int]

    @property
    def lost(self) -> int:
        """Steps to be done once more."""
        return max(0, self.step - self.checkpoint)


class Reports(TrainerCallback):
    """Tells the parent, through a pipe, what the run is doing."""

    def __init__(self, tell: Callable[[str, int], None]):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell("begun", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.tell("evaluation" if control.should_evaluate else "step", state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.tell("step", state.global_step)


@dataclass
class Start:
    """The processes of one start of a run, and what they told so far.

    Attributes:
        pids: Process ids, by rank.
        pipe: Where the first process tells what it is doing.
        began: When they were forked.
        doing: The last thing told.
        step: The last step told.
        sealed: The last checkpoint told to be whole.
    """

    pids: list[int]
    pipe: int
    began: float
    doing: str = "start"
    step: int = 0
    sealed: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)

    def events(self, until: float | None = None) -> Iterator[str]:
        """What is told, up to a moment or the end of the pipe."""
        last = time.monotonic()
        with selectors.DefaultSelector() as selector, os.fdopen(os.dup(self.pipe), "rb", buffering=0) as lines:
            selector.register(lines, selectors.EVENT_READ)
            while True:
                wait = PATIENCE if until is None else until - time.monotonic()
                if wait <= 0:
                    return
                if not selector.select(wait):
                    if until is not None:
                        return
                    raise RuntimeError(f"nothing was heard for {PATIENCE} s while doing {self.doing}")
                text = lines.read(4096)
                if not text:
                    return
                for line in text.decode().splitlines():
                    doing, step = line.split()
                    now = time.monotonic()
                    self.times.setdefault(self.doing, []).append(now - last)
                    last, self.doing, self.step = now, doing, max(self.step, int(step))
                    if doing == "sealed":
                        self.sealed, self.doing = int(step), "step"
                    yield doing

    def wait(self) -> list[int]:
        """Exit statuses, negative for a signal."""
        os.close(self.pipe)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def kill(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)


def start(kind: str, folder: Path, use_cpu: bool = True) -> Start:
    """Fork the processes of a run, which goes on from its last checkpoint if there is one."""
    count, (read, write) = processes(kind), os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            if count > 1:
                os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
            os._exit(run(kind, folder, write if rank == 0 else None, use_cpu))
        pids.append(pid)
    os.close(write)
    return Start(pids, read, time.monotonic())


def run(kind: str, folder: Path, pipe: int | None, use_cpu: bool) -> int:
    """What a forked process does; its output goes into a file beside the run's folder."""

    def tell(doing: str, step: int) -> None:
        if pipe is not None:
            os.write(pipe, f"{doing} {step}\n".encode())

    @contextlib.contextmanager
    def told(checkpoint: Path) -> Iterator[None]:
        tell("saving", step_of(checkpoint))
        yield
        tell("sealed", step_of(checkpoint))

    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        ours = trainer(kind, folder, STEPS, [Reports(tell)], **SETTINGS, use_cpu=use_cpu)
        around_saving(ours, told)
        ours.train(resume_from_checkpoint="auto")
        tell("writing", STEPS)
        ours.save_model()
        tell("written", STEPS)
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent prints it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


class Victims:
    """Runs of one kind, one behind the other, that are killed so many times in all.

    Args:
        kind: Of run.
        folder: Where they go.
        chance: Draws the moments.
        typical: Seconds that a start, a step, and the writing of a checkpoint take, learnt on the way.
        use_cpu: Not a GPU.
    """

    def __init__(
        self, kind: str, folder: Path, chance: random.Random, typical: dict[str, float], use_cpu: bool = True
    ):
        self.kind, self.folder, self.chance, self.typical, self.use_cpu = kind, folder, chance, typical, use_cpu
        self.kills: list[Kill] = []
        self.runs: list[Path] = []

    def kill(self, count: int) -> None:
        """Kill `count` times; every run is brought to its end."""
        while len(self.kills) < count:
            victim = self.folder / f"{self.kind}-{len(self.runs) + 1}"
            self.runs.append(victim)
            while not self.once(victim, kills=len(self.kills) < count):
                pass

    def once(self, folder: Path, kills: bool) -> bool:
        """One start, ended by a kill or not; whether the run came to its end."""
        child = start(self.kind, folder, self.use_cpu)
        sent = self.strike(child) if kills else None
        seconds, during = time.monotonic() - child.began, child.doing
        if sent is not None and sent != signal.SIGTERM:
            child.kill(signal.SIGKILL, list(range(len(child.pids))))  # the others, where one alone was hit
        for _ in child.events():
            pass
        status = child.wait()
        for doing, values in child.times.items():
            self.typical[doing] = statistics.median([*values, self.typical.get(doing, values[0])])
        if set(status) == {0}:
            return True
        allowed = {-signal.SIGKILL} if sent == signal.SIGKILL else {128 + signal.SIGTERM, -signal.SIGTERM}
        allowed |= {0} if sent == signal.SIGKILL else set()
        allowed |= {1} if -signal.SIGTERM in status else set()  # a process that is gone takes the other one down
        if sent is None or not set(status) <= allowed:
            log = folder.with_suffix(".log").read_text()
            raise RuntimeError(f"{folder.name} ended with {status} after {sent}:\n{log[-4000:]}")
        self.kills.append(self.found(folder, child, signal.Signals(sent), during, seconds, status))
        return False

    def strike(self, child: Start) -> int | None:
        """Wait for a random moment and send the signal; None if the run ended before."""
        chance = self.chance
        aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
        number = signal.SIGTERM if chance.random() < 0.25 else signal.SIGKILL
        if aim != "start":
            left = chance.randint(1, 3)
            for event in child.events():
                left -= event == aim
                if not left:
                    break
            else:
                return None
        for _ in child.events(until=time.monotonic() + chance.uniform(0, 0.8 * self.typical.get(aim, 0.5))):
            pass
        ranks = list(range(len(child.pids)))
        # A scheduler signals all processes; a machine that fails takes one.
        child.kill(number, ranks if chance.random() < 0.5 else [chance.choice(ranks)])
        return number

    def found(self, folder: Path, child: Start, sent: signal.Signals, during: str, seconds: float, status: list[int]):
        """What is in the folder behind a kill.

        Raises:
            RuntimeError: A checkpoint that was whole is lost, or not whole.
        """
        last = last_complete_checkpoint(folder)
        reached = step_of(Path(last)) if last else 0
        if reached < child.sealed:
            raise RuntimeError(f"{folder}: checkpoint-{child.sealed} was whole, and the newest is {last}")
        if last:
            check_whole(Path(last))
        return Kill(self.kind, sent.name, during, seconds, child.step, reached, status)


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common, by name."""
    found = []
    ends = one / f"checkpoint-{STEPS}", other / f"checkpoint-{STEPS}"
    tensors = sorted(path.name for path in ends[0].iterdir() if path.suffix in (".pt", ".pth") or path.is_dir())
    for name in tensors:
        found += [] if equal(*(loaded(end / name) for end in ends)) else [name]
    exact = [path.relative_to(one) for folder in (one, ends[0]) for path in folder.glob("*.safetensors")]
    exact += [Path("metrics.jsonl"), *sorted(path.relative_to(one) for path in (one / "rollouts").glob("*.parquet"))]
    found += [str(name) for name in exact if (one / name).read_bytes() != (other / name).read_bytes()]
    if len(exact) < 4 or not tensors:
        raise RuntimeError(f"{one} is not a finished run")
    return found


def loaded(path: Path) -> Any:
    """What a file holds, or a folder of shards."""
    if not path.is_dir():
        return torch.load(path, map_location="cpu", weights_only=False)  # a GPU in use could not be forked
    whole = path.with_suffix(".whole")
    dcp_to_torch_save(path, whole)
    return torch.load(whole, map_location="cpu", weights_only=False)


def equal(one: Any, other: Any) -> bool:
    """Whether two nested states are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def show(console: Console, kills: list[Kill], outcomes: dict[str, dict[str, list[str]]]) -> None:
    """A line for each kind of run, by what it was doing."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("run", "killed while", "SIGKILL", "SIGTERM", "steps lost, mean", "at most"):
        table.add_column(column, justify="left" if column in ("run", "killed while") else "right")
    for kind in [*outcomes, "all"]:
        for during in [*sorted({kill.during for kill in kills}), "any moment"]:
            found = [k for k in kills if kind in (k.kind, "all") and during in (k.during, "any moment")]
            if found and (kind == "all" or during == "any moment"):
                counts = [str(sum(k.signal == name for k in found)) for name in ("SIGKILL", "SIGTERM")]
                lost = [k.lost for k in found]
                table.add_row(kind, during, *counts, f"{statistics.mean(lost):.2f}", str(max(lost)))
    console.print(table)
    for kind, runs in outcomes.items():
        wrong = {name: found for name, found in runs.items() if found}
        console.print(f"{kind}: {len(runs)} run(s), {wrong or 'all equal to the unbroken one, to the bit'}")


def main(argv: list[str] | None = None) -> int:
    """Kill, resume, compare; 1 if anything is lost or differs."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Kills runs and resumes them.")
    p.add_argument("--kills", type=int, default=100, help="in all, shared among the kinds")
    p.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of runs")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where; a GPU serves runs of one process")
    p.add_argument("--json", type=Path, help="write every kill there")
    args = p.parse_args(argv)
    if args.kills < 1:
        p.error(f"kills={args.kills} must be at least 1.")
    if args.device != "cpu" and any(processes(kind) > 1 for kind in args.kinds):
        p.error(f"device={args.device}: runs of several processes stay on the CPU; name --kinds of one.")
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"device={args.device}: there is none here.")
    if args.device != "cpu" and torch.cuda.is_initialized():
        p.error("a GPU is in use before any run is forked, as bitsandbytes does when imported: uninstall it here.")
    chance, typical, began = random.Random(args.seed), {}, time.monotonic()
    kills: list[Kill] = []
    outcomes: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for i, kind in enumerate(args.kinds):
            whole, victims = Path(name) / kind, Victims(kind, Path(name), chance, typical, args.device == "cpu")
            victims.once(whole, kills=False)
            victims.kill(args.kills // len(args.kinds) + (i < args.kills % len(args.kinds)))
            kills += victims.kills
            outcomes[kind] = {victim.name: differences(whole, victim) for victim in victims.runs}
            print(f"{kind}: {len(victims.kills)} kills, {time.monotonic() - began:.0f} s", flush=True)
    console = Console(width=None if sys.stdout.isatty() else 110)
    show(console, kills, outcomes)
    seconds = time.monotonic() - began
    console.print(f"{len(kills)} kills in {seconds:.0f} s; seconds: { {k: round(v, 3) for k, v in typical.items()} }")
    if args.json:
        content = {"kills": [asdict(kill) for kill in kills], "differences": outcomes, "seconds": seconds}
        args.json.write_text(json.dumps(content, indent=1))
    return int(any(found for runs in outcomes.values() for found in runs.values()))


if __name__ == "__main__":
    sys.exit(main())
