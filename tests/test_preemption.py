"""SIGTERM and SIGUSR1 end a run behind a checkpoint of a whole step, with status 143; the run goes on unbroken."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, current_process
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

import interrupted
from ebft import preemption
from ebft.checkpoints import check_whole, whole_checkpoints
from ebft.preemption import Preemption, Stopped
from training import assert_equal_weights, files, read_metrics

EPOCHS = dict(save_strategy="epoch", eval_strategy="epoch", save_total_limit=1)


class Signal(TrainerCallback):
    """Sends this process a signal at a moment of a step."""

    def __init__(self, moment: str, step: int, number: int = signal.SIGTERM):
        def send(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, moment, send)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return interrupted.run("full", tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("moment", "step", "number", "stopped"),
    [
        ("on_step_begin", 2, signal.SIGTERM, 3),  # the step at hand is finished
        ("on_evaluate", 1, signal.SIGUSR1, 1),  # as is its evaluation
        ("on_save", 4, signal.SIGTERM, 4),  # saved once, and no step more
        ("on_step_begin", 5, signal.SIGTERM, None),  # the last: the run ends as it would
    ],
)
def test_a_signal_ends_the_run_behind_a_checkpoint(unbroken, tmp_path, moment, step, number, stopped):
    callbacks = [Signal(moment, step, number)]
    if stopped is None:
        interrupted.run("full", tmp_path, callbacks=callbacks)
    else:
        with pytest.raises(Stopped) as left:
            interrupted.run("full", tmp_path, callbacks=callbacks)
        assert left.value.code == 143 and left.value.checkpoint == tmp_path / f"checkpoint-{stopped}"
        assert whole_checkpoints(tmp_path)[-1] == left.value.checkpoint
        check_whole(left.value.checkpoint)
        resumed = interrupted.run("full", tmp_path, resume=True)
        assert len(resumed.weights) == 7 - stopped
        assert_equal_weights(resumed.weights[-1], unbroken.weights[-1])
    assert signal.getsignal(number) is signal.SIG_DFL
    assert files(tmp_path, "metrics.jsonl") == files(unbroken.folder, "metrics.jsonl")
    assert files(tmp_path, "rollouts/*") == files(unbroken.folder, "rollouts/*")


def test_a_signal_to_all_processes_leaves_the_loaders_workers_to_the_run(unbroken, tmp_path):
    class SignalAll(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for process in [*active_children(), current_process()]:
                os.kill(process.pid or 0, signal.SIGTERM)
                time.sleep(0.2)
            assert len(active_children()) == 1

    with pytest.raises(Stopped):
        interrupted.run("full", tmp_path, callbacks=[SignalAll()], dataloader_num_workers=1)
    resumed = interrupted.run("full", tmp_path, resume=True)
    assert len(resumed.weights) == 6
    assert_equal_weights(resumed.weights[-1], unbroken.weights[-1])


def test_behind_an_epochs_last_step_its_evaluation_comes_first(tmp_path):
    """Three steps make an epoch; a checkpoint between the last one and the evaluation would never be evaluated."""
    whole = interrupted.run("full", tmp_path / "whole", **EPOCHS)
    for step, stopped in ((2, 3), (0, 1)):
        folder = tmp_path / str(step)
        with pytest.raises(Stopped) as left:
            interrupted.run("full", folder, callbacks=[Signal("on_step_begin", step)], **EPOCHS)
        assert left.value.checkpoint.name == f"checkpoint-{stopped}"
        assert ["eval_loss" in record for record in read_metrics(folder)] == [False] * stopped + [True] * (
            stopped == 3
        )
        interrupted.run("full", folder, resume="auto", **EPOCHS)
        assert files(folder, "metrics.jsonl") == files(whole.folder, "metrics.jsonl")


def test_saves_what_a_resume_needs_whatever_the_strategy(tmp_path):
    best = dict(
        metric_for_best_model="loss", greater_is_better=True, load_best_model_at_end=True, save_only_model=True
    )
    with pytest.raises(Stopped) as left:  # the loss falls, so that no step but the first is the best
        interrupted.run("full", tmp_path, callbacks=[Signal("on_step_begin", 2)], save_strategy="best", **best)
    assert left.value.checkpoint.name == "checkpoint-3"
    check_whole(left.value.checkpoint)
    assert (left.value.checkpoint / "optimizer.pt").exists()


def test_a_checkpoint_of_the_model_alone_is_not_the_one_to_leave_behind(tmp_path):
    """The signal comes while it is written: the run goes on for a step, and saves all."""
    with pytest.raises(Stopped) as left:
        interrupted.run("full", tmp_path, callbacks=[Signal("on_save", 2)], save_steps=2, save_only_model=True)
    assert left.value.checkpoint.name == "checkpoint-3"
    check_whole(left.value.checkpoint)


def test_a_second_sigterm_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(preemption, "ONE_NOTICE", 0.2)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        watcher = Preemption(trainer)
        watcher.watch()
        for _ in range(600):
            os.write(write, b"!" if watcher.told else b".")
            time.sleep(0.1)
        os._exit(0)
    os.read(read, 1)
    for _ in range(2):  # at once: one notice, that came twice
        os.kill(pid, signal.SIGTERM)
    while os.read(read, 1) != b"!":
        pass
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_a_handler_of_ones_own_is_left_in_place():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        watcher = Preemption(SimpleNamespace(accelerator=SimpleNamespace(num_processes=1)))
        watcher.watch()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1] and not watcher.told
        watcher.unwatch()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_two_processes_stop_behind_the_same_step(tmp_path):
    """The command's launcher alone gets the signal, as from a scheduler that signals a batch script."""
    from benchmarks.tiny_runs import documents, model, tokenizer

    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    documents(40).to_json(tmp_path / "rows.jsonl")
    words = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--output_dir", "run", "--use_cpu"]
    words += ["--num_processes", "2", "--max_steps", "100000", "--report_to", "none", "--save_strategy", "no"]
    words += ["--max_length", "32", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ebft", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    (checkpoint,) = whole_checkpoints(tmp_path / "run")
    check_whole(checkpoint)
    assert f"stopped behind run/{checkpoint.name}; continue with resume_from_checkpoint: last" in out
    assert "Traceback" not in error
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2


def test_the_launcher_leaves_its_processes_the_time_they_need(tmp_path):
    """Torch's own limit, of 30 s, is 1 s here, and saving takes three."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(3)\n    pathlib.Path('saved').touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').touch()\ntime.sleep(300)\n"
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", str(script)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ebft.cli.launcher", *launcher],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PET_SHUTDOWN_TIMEOUT": "1"},
    )
    while process.poll() is None and not (tmp_path / "ready").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=300)[1]
    assert (process.returncode, (tmp_path / "saved").exists()) == (143, True), error
    assert "Traceback" not in error
