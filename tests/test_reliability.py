"""What goes wrong while a run writes, reads or resumes: a clear error, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import TrainerCallback

import interrupted
from benchmarks.tiny_runs import KINDS
from ebft import EBFTTrainer
from ebft.artifacts import LOCK
from ebft.checkpoints import check_whole, last_complete_checkpoint
from ebft.locks import lock
from training import documents, files, small_model, train

KIND = "ngram"  # the quickest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints behind its second and fourth step of four."""
    folder = tmp_path_factory.mktemp("finished")
    interrupted.run(KIND, folder, max_steps=4)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def everything(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(folder):
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (None, dict(ce_coef=0.5), r"checkpoint-4' was written with other settings \(ce_coef 0.3 -> 0.5\): set them"),
        (damage, {}, r"checkpoint-4' is damaged: optimizer.pt has 0 bytes of .*resume from .*checkpoint-2\."),
    ],
)
def test_a_resume_that_cannot_be_right_is_refused(run_folder, spoil, settings, message):
    if spoil:
        spoil(run_folder)
    before = everything(run_folder)
    for resume in (True, "last", "auto"):
        with pytest.raises(ValueError, match=message):
            interrupted.run(KIND, run_folder, resume=resume, max_steps=6, **settings)
    assert everything(run_folder) == before


def test_other_documents_are_refused(run_folder, monkeypatch):
    before = everything(run_folder)
    monkeypatch.setattr(interrupted, "ROWS", [*interrupted.ROWS[:-1], {"input_ids": [3] * 14}])
    with pytest.raises(ValueError, match="train_dataset is not the one it was trained on .crc32 .*: bring that back"):
        interrupted.run(KIND, run_folder, resume=True, max_steps=6)
    assert everything(run_folder) == before


def test_a_second_run_in_the_same_folder_is_refused(run_folder):
    held = lock(run_folder, LOCK, "ebft train")
    with pytest.raises(ValueError, match="another `ebft train` is at work there"):
        interrupted.run(KIND, run_folder, resume=True, max_steps=6)
    held.release()
    assert len(interrupted.run(KIND, run_folder, resume=True, max_steps=5).weights) == 2
    lock(run_folder, LOCK, "ebft train").release()


def test_auto_begins_anew_what_never_reached_a_checkpoint(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds another run"):
        interrupted.run(KIND, tmp_path / "run", max_steps=4)
    assert len(interrupted.run(KIND, tmp_path / "run", resume="auto", max_steps=4).weights) == 5
    assert files(tmp_path / "run", "metrics.jsonl") == files(finished, "metrics.jsonl")
    assert len(interrupted.run(KIND, tmp_path / "run", resume="auto", max_steps=5).weights) == 2


class FullDisk(EBFTTrainer):
    """The disk is full while step 4's checkpoint is written: behind the weights, in the midst of the optimiser."""

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.state.global_step == 4:
            (Path(output_dir) / "optimizer.pt").symlink_to("/dev/full")


def test_a_full_disk_while_a_checkpoint_is_written(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(interrupted, "train", lambda *args, **keys: train(*args, trainer_class=FullDisk, **keys))
        with pytest.raises(OSError, match="checkpoint-4 could not be written") as error:
            interrupted.run(KIND, tmp_path, max_steps=4, save_total_limit=1)
    assert "make room, then go on from" in str(error.value) and "checkpoint-2" in str(error.value)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    check_whole(tmp_path / "checkpoint-2")
    interrupted.run(KIND, tmp_path, resume=True, max_steps=4, save_total_limit=1)
    assert files(tmp_path, "checkpoint-4/model.safetensors") == files(finished, "checkpoint-4/model.safetensors") != {}
    assert files(tmp_path, "metrics.jsonl") == files(finished, "metrics.jsonl")


class Spoil(TrainerCallback):
    """Does something behind a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_a_full_disk_while_metrics_are_written(tmp_path):
    metrics, kept = tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"

    def fill():
        metrics.rename(kept)
        metrics.symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"metrics.jsonl could not be written .*No space left .*from .*checkpoint-2"):
        interrupted.run(KIND, tmp_path, callbacks=[Spoil(3, fill)])
    metrics.unlink()
    kept.rename(metrics)
    assert len(interrupted.run(KIND, tmp_path, resume=True).weights) == 5


def test_a_streams_file_that_is_gone(tmp_path):
    rows = [tmp_path / f"rows-{i}.jsonl" for i in range(2)]
    for i, path in enumerate(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in documents([20] * 6, seed=i)))
    stream = load_dataset("json", data_files=[str(path) for path in rows], split="train", streaming=True)
    settings = dict(max_steps=8, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, kernel="ngram")
    with pytest.raises(OSError, match=r"train_dataset could not be read behind step 6 .*rows-1.jsonl.*checkpoint-"):
        train(small_model(), stream, tmp_path / "run", settings=settings, callbacks=[Spoil(1, rows[1].unlink)])


def test_killed_runs_end_as_unbroken_ones(tmp_path):
    """The short version of the fault-injection run: real processes of every kind, killed and resumed."""
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "8", "--json", str(tmp_path / "kills.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "kills.json").read_text())
    assert len(found["kills"]) == 8
    assert found["differences"].keys() == set(KINDS)
    assert all(runs and not any(runs.values()) for runs in found["differences"].values())
