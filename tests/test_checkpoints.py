"""Checkpoints are whole or do not count, whenever the writing process is killed; what happens to them is noticed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ebft.checkpoints import (
    begin,
    check_whole,
    checksums,
    files_of,
    last_complete_checkpoint,
    rotate,
    seal,
    step_of,
    tidy,
    whole_checkpoints,
)
from ebft.locks import is_locked, lock

FILES = {"model.safetensors": 70_000, "optimizer.pt": 140_000, "trainer_state.json": 100}


def write(folder: Path, step: int, **about) -> Path:
    """A checkpoint as a trainer writes it, of bytes that depend on the step."""
    checkpoint = folder / f"checkpoint-{step}"
    begin(checkpoint)
    for name, size in FILES.items():
        (checkpoint / name).write_bytes(bytes([step % 256]) * size)
    seal(checkpoint, checksums(checkpoint, files_of(checkpoint)), about)
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_not_whole_does_not_count(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    whole = write(tmp_path, 2)
    begin(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")  # though transformers' last file is there
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert whole_checkpoints(tmp_path) == [whole]
    with pytest.raises(ValueError, match=r"checkpoint-4' is not a whole checkpoint: .*resume from .*checkpoint-2\."):
        check_whole(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-6' is not a whole checkpoint: there is no such folder"):
        check_whole(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"is a run's folder: name .*checkpoint-2, its newest one\."):
        check_whole(tmp_path)
    for name in ("_deleting-checkpoint-1", "_deleting-_replaced-checkpoint-1"):
        (tmp_path / name).mkdir()
    tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-best"]


def test_a_checkpoint_killed_before_its_mark_does_not_count(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "checkpoint-4").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_same_step_saved_again_is_never_without_a_whole_checkpoint(tmp_path):
    write(tmp_path, 2)
    begin(tmp_path / "checkpoint-2")  # and killed here
    last = last_complete_checkpoint(tmp_path)
    assert last == str(tmp_path / "_replaced-checkpoint-2") and step_of(Path(last)) == 2
    check_whole(Path(last))
    again = write(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2"] and whole_checkpoints(tmp_path) == [again]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (0, None, [2, 4, 6, 8]),
        (3, None, [4, 6, 8]),
        (1, None, [8]),
        (1, 4, [4, 8]),
        (2, 4, [4, 8]),
        (3, 2, [2, 6, 8]),
        (2, 8, [6, 8]),
        (9, None, [2, 4, 6, 8]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    for step in (8, 6, 2, 4):  # whatever the order and the times of their folders
        write(tmp_path, step)
    begin(tmp_path / "checkpoint-10")
    rotate(tmp_path, limit, best and f"somewhere/else/checkpoint-{best}")
    assert [step_of(path) for path in whole_checkpoints(tmp_path)] == left
    assert names(tmp_path) == sorted([*(f"checkpoint-{step}" for step in left), "checkpoint-10"])


def truncate(checkpoint):
    with open(checkpoint / "optimizer.pt", "r+b") as file:
        file.truncate(100)


def flip(checkpoint):
    with open(checkpoint / "model.safetensors", "r+b") as file:
        file.seek(50_000)
        file.write(b"?")


DAMAGES = {
    "optimizer.pt has 100 bytes of 140,000": truncate,
    "model.safetensors has other contents than when it was written": flip,
    "trainer_state.json is missing": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "manifest.json is missing": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda checkpoint: (checkpoint / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_named_with_the_checkpoint_before(tmp_path, message):
    older, newer = write(tmp_path, 2), write(tmp_path, 4)
    check_whole(newer)
    DAMAGES[message](newer)
    with pytest.raises(ValueError, match=f"checkpoint-4' is damaged: {message}.* Nothing was changed; resume .*-2"):
        check_whole(newer)
    DAMAGES[message](older)
    with pytest.raises(ValueError, match="there is none before it: start a new run"):
        check_whole(older)


def test_sizes_alone_are_read_no_contents(tmp_path):
    checkpoint = write(tmp_path, 2)
    flip(checkpoint)
    check_whole(checkpoint, contents=False)
    truncate(checkpoint)
    with pytest.raises(ValueError, match="damaged"):
        check_whole(checkpoint, contents=False)


def test_the_model_alone_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match="without the optimiser .*a new one can start with it as model_name_or_path"):
        check_whole(write(tmp_path, 2, model_only=True))


PATIENCE = 600  # seconds


def forked(work) -> int:
    """Run `work` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def test_killed_at_any_moment_the_last_whole_checkpoint_is_there(tmp_path):
    """A process that does nothing but save, twice each step, and rotate is killed, and goes on, again and again."""
    chance, began = random.Random(0), time.monotonic()
    write(tmp_path, 1)
    typical = time.monotonic() - began
    done, interrupted, reached, kills = tmp_path / "done", 0, 0, 0

    def save_for_ever():
        tidy(tmp_path)
        last = last_complete_checkpoint(tmp_path)
        step = step_of(Path(last)) if last else 0
        while True:
            step += 1
            for _ in range(2):
                checkpoint = write(tmp_path, step)
                rotate(tmp_path, 1, None)
                done.write_text(str(step))
                assert checkpoint.exists()

    # As often as it takes on a machine that is busy to come some way, and to be killed while one is replaced.
    while kills < 25 or not (interrupted and reached > 5):
        assert time.monotonic() < began + PATIENCE
        kills += 1
        pid = forked(save_for_ever)
        time.sleep(chance.uniform(0, 8 * typical))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        interrupted += any(path.name.startswith(("_deleting", "_replaced")) for path in tmp_path.iterdir())
        last, text = last_complete_checkpoint(tmp_path), done.read_text() if done.exists() else ""
        # The first write may have been quicker than the machine now is: without progress, later kills are later.
        typical *= 1.2 if text in ("", str(reached)) else 1
        if text:
            reached = int(text)
            assert last is not None and step_of(Path(last)) >= reached
        if last:
            check_whole(Path(last))


def test_the_lock_ends_with_its_process(tmp_path):
    def hold():
        held = lock(tmp_path, "lock", "ebft train")
        (tmp_path / "held").touch()
        time.sleep(60)
        held.release()

    pid = forked(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert is_locked(tmp_path, "lock")
    with pytest.raises(ValueError, match="another `ebft train` is at work there: wait for it"):
        lock(tmp_path, "lock", "ebft train")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not is_locked(tmp_path, "lock")
    lock(tmp_path, "lock", "ebft train").release()


def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(ValueError, match="output_dir='/proc/runs' cannot be made or written to .*name one where"):
        lock(Path("/proc/runs"), "lock", "ebft train")


def test_the_manifest_holds_what_the_run_says_of_itself(tmp_path):
    manifest = json.loads((write(tmp_path, 3, settings={"seed": 1}) / "manifest.json").read_text())
    assert manifest["settings"] == {"seed": 1}
    assert {name: size for name, (size, _) in manifest["files"].items()} == FILES
