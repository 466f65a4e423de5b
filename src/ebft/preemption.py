"""A run that is told to stop: SIGTERM or SIGUSR1 ends it behind a checkpoint, with exit status 143."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

STATUS = 128 + signal.SIGTERM  # 143, what a shell says of a process that SIGTERM ended
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_NOTICE = 2.0  # seconds: schedulers signal a whole group and launchers pass signals on, so that one comes twice


def spare_workers(loader: Any) -> None:
    """Have the workers of a prepared data loader survive a SIGTERM to all processes: the run needs them."""
    inner = loader.base_dataloader
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)


def _start_worker(also: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # they end with their parent, whatever ends that
    if also is not None:
        also(worker)


class Stopped(SystemExit):
    """Training was told to stop and has; left alone it ends the process with `STATUS`.

    Attributes:
        checkpoint: Where the run goes on.
    """

    def __init__(self, checkpoint: Path):
        super().__init__(STATUS)
        self.checkpoint = checkpoint


class Preemption(TrainerCallback):
    """Finishes the step at hand when a signal comes, with the evaluation that is due, saves, and raises `Stopped`.

    All processes stop behind the same step, whichever of them got the signal. A second SIGTERM ends a process at once.
    A handler of the user's own is left in place.

    transformers' `enable_jit_checkpoint` is not used: it also saves in front of the optimiser's step, where the
    gradient is lost, lets each process stop at a step of its own, goes through the evaluation and clean-up of a
    finished training (which may delete that very checkpoint), and ends with status 0.

    Args:
        trainer: Whose accelerator joins the processes.
    """

    def __init__(self, trainer: Trainer):
        self.accelerator = trainer.accelerator
        self.told = self.stops = False  # this process was told; all processes know it
        self._first_sigterm: float | None = None
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Listen to the signals; only a program's main thread can."""
        self.told = self.stops = False
        self._first_sigterm = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._on_signal)

    def unwatch(self) -> None:
        """Give the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _on_signal(self, number: int, frame: Any) -> None:
        self.told = True
        if number != signal.SIGTERM:
            return
        now = time.monotonic()
        if self._first_sigterm is None:
            self._first_sigterm = now
        elif now - self._first_sigterm > ONE_NOTICE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen, where the trainer's `train` has not begun to before."""
        if not self._before:
            self.watch()

    def on_train_end(self, args, state, control, **kwargs):
        """Listen no more."""
        self.unwatch()

    def on_step_end(self, args, state, control, **kwargs):
        """Save behind this step; behind the last of an epoch when the epoch's own evaluation is done."""
        last_of_epoch = state.epoch is not None and state.epoch == int(state.epoch)
        if self._all_stop() and not last_of_epoch and not control.should_training_stop:
            self._save(args, control)

    def on_evaluate(self, args, state, control, **kwargs):
        """Save behind this evaluation."""
        self.on_step_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save behind this epoch."""
        if self._all_stop() and not control.should_training_stop:
            self._save(args, control)

    def on_save(self, args, state, control, **kwargs):
        """Leave, unless training has come to its end anyway; where the model alone was saved, behind the next step."""
        if not self._all_stop() or control.should_training_stop or args.save_only_model:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.process_index == 0:
            print(f"stopped behind {checkpoint}; continue with resume_from_checkpoint: last", flush=True)
        raise Stopped(checkpoint)

    def _save(self, args: Any, control: Any) -> None:
        control.should_save = True
        args.save_only_model = False  # a run cannot go on from the model alone
        if args.save_strategy == SaveStrategy.BEST:
            args.save_strategy = SaveStrategy.STEPS  # else an evaluation that is no better takes the save back

    def _all_stop(self) -> bool:
        """Whether any process was told to stop; every process has to ask at the same moments."""
        if self.accelerator.num_processes > 1 and not self.stops:
            told = torch.tensor([float(self.told)], device=self.accelerator.device)
            total: Any = self.accelerator.reduce(told, reduction="sum")
            self.stops = bool(total.item())
        else:
            self.stops = self.stops or self.told
        return self.stops
