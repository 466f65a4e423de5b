"""The command of the pocket tasks: its checks can fail, and its base model loads in plain transformers."""

import json
import math
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft.pocket.__main__ import main
from ebft.pocket.files import check_boundary, check_splits
from ebft.scratch.corpus import train_tokenizer
from pocket_folders import rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The whole command, in a process of its own: it quiets the libraries' logging and sets the threads."""
    folder = tmp_path_factory.mktemp("pocket") / "out"
    command = [sys.executable, "-m", "ebft.pocket", "qa_coding", "--smoke", "--output_dir", str(folder), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_base_model_loads_and_writes(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = tokenizer(rows(folder, "validation")[0]["prompt"], return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    untrained = AutoModelForCausalLM.from_pretrained(folder / "untrained")
    assert AutoTokenizer.from_pretrained(folder / "untrained").get_vocab() == tokenizer.get_vocab()
    losses = [network(**ids, labels=ids["input_ids"]).loss.item() for network in (model, untrained)]
    assert losses[0] < losses[1] - 0.5 and abs(losses[1] - math.log(len(tokenizer))) < 1
    for name in ("train", "validation", "test"):
        check_boundary(name, rows(folder, name), tokenizer)
    assert json.loads((folder / "task.json").read_text())["seed"] == 3


def test_second_run_into_the_folder(folder, capsys):
    with pytest.raises(SystemExit) as error:
        main(["qa_coding", "--smoke", "--output_dir", str(folder)])
    assert error.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "task.json").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["qa_coding", "--seed", "-1"], "seed=-1 must be at least 0"),
        (["qa_coding", "--parallel_text", "a.jsonl"], "is for the task translation"),
        (["qa"], "invalid choice"),
    ],
)
def test_what_is_wrong_is_told(options, told, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    assert told in capsys.readouterr().err


def test_shared_prompt_is_named():
    check_splits({"train": ["a", "b", "a"], "test": ["c"]})
    with pytest.raises(ValueError, match="train and test share the prompt 'b'"):
        check_splits({"train": ["a", "b"], "validation": ["d"], "test": ["c", "b"]})


def test_prompt_within_a_token_is_named():
    tokenizer = train_tokenizer(["keep the numbers"] * 9, 300)
    good, bad = {"prompt": "keep", "completion": " the"}, {"prompt": "num", "completion": "bers"}
    check_boundary("train", [good], tokenizer)
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: the prompt 'num'"):
        check_boundary("train", [good, bad], tokenizer)
