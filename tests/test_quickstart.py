"""The quickstart's small version from end to end, and what it promises of its data."""

import csv
import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft import extras
from ebft.evaluation.settings import LENGTHS
from ebft.quickstart.__main__ import ARTIFACTS, MODELS, SHOWN, SMOKE, main
from ebft.scratch import corpus
from ebft.scratch.folder import prepare_folder

PAIRS = ("sft - base", "ebft - base", "ebft - sft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished smoke run."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    # In a process of its own: it quiets the libraries' logging and sets the number of threads.
    command = [sys.executable, "-m", "ebft.quickstart", "--smoke", "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_all_numbers_are_there(folder):
    results = json.loads((folder / "results.json").read_text())
    numbers = {(row["model"], row["length"]): row for row in results["results"] if row["measure"] in SHOWN}
    assert set(numbers) == {(name, length) for name in (*MODELS, *PAIRS) for length in (None, *LENGTHS)}
    assert all(row["low"] <= row["mean"] <= row["high"] for row in numbers.values())
    # A uniform guess costs log(vocabulary); a difference is the difference of its two.
    assert 0 < numbers["base", None]["mean"] < math.log(SMOKE.vocab_size)
    for length in (None, *LENGTHS):
        sft, ebft = (numbers[name, length]["mean"] for name in ("sft", "ebft"))
        assert numbers["ebft - sft", length]["mean"] == pytest.approx(ebft - sft)
        assert sft != ebft
    with open(folder / "results.csv", newline="") as file:
        assert [float(row["mean"]) for row in csv.DictReader(file)] == [row["mean"] for row in results["results"]]


def test_plot_is_a_picture(folder):
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_models_load_in_plain_transformers(folder):
    weights = []
    for name in MODELS:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        ids = tokenizer("import os\n", return_tensors="pt")
        assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
        assert tokenizer.eos_token_id == model.config.eos_token_id != model.config.pad_token_id
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    base, sft, ebft = weights
    assert not torch.equal(base, sft) and not torch.equal(base, ebft) and not torch.equal(sft, ebft)


def test_saved_tokenizer_is_the_one_of_the_training(folder):
    files, held_out = corpus.hold_out(corpus.source_files(), SMOKE.held_out_files)
    tokenizer = corpus.train_tokenizer(map(corpus.read, files), SMOKE.vocab_size)
    for name in MODELS:
        loaded = AutoTokenizer.from_pretrained(folder / name)
        for file in held_out:
            assert loaded(corpus.read(file))["input_ids"] == tokenizer(corpus.read(file))["input_ids"]


def test_sft_and_ebft_see_the_same_number_of_documents(folder):
    records = {name: (folder / name / "metrics.jsonl").read_text().splitlines() for name in MODELS}
    steps = {name: [json.loads(line) for line in lines] for name, lines in records.items()}
    tokens = {name: [r["num_tokens"] for r in lines if "num_tokens" in r] for name, lines in steps.items()}
    assert tokens["sft"] == tokens["ebft"]
    assert not any("feature_matching_loss" in r for r in steps["sft"])
    assert any("feature_matching_loss" in r for r in steps["ebft"])


def test_continuations_of_one_prompt_by_each_model(folder):
    written = json.loads((folder / "results.json").read_text())["continuations"]
    assert all(set(texts) == {"prompt", "held-out text", *MODELS} for texts in written)


def test_held_out_files_are_no_training_files(folder):
    files = json.loads((folder / "results.json").read_text())["files"]
    training, held_out = set(files["training"]), set(files["held_out"])
    assert len(held_out) == SMOKE.held_out_files
    assert not training & held_out
    assert len(training | held_out) == len(corpus.source_files())


def test_second_run_into_the_folder(folder, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--smoke", "--output_dir", str(folder)])
    assert error.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "results.json").exists()


def test_overwrite_removes_what_a_quickstart_wrote_and_no_more(tmp_path):
    for name in (*ARTIFACTS, "diary.txt"):
        (tmp_path / name).write_text("")
    prepare_folder(tmp_path, True, ARTIFACTS, "quickstart")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_corpus_is_the_standard_library_without_tests():
    files, library = corpus.source_files(), Path(sysconfig.get_path("stdlib"))
    assert library / "argparse.py" in files
    assert not [file for file in files if set(file.relative_to(library).parts) & {"test", "site-packages"}]
    assert corpus.source_files() == files


def test_documents_are_whole_files_cut_up(tmp_path):
    file = tmp_path / "a.py"
    file.write_bytes(b"import os\n" * 20 + b"\xff\n")  # a byte that is not UTF-8
    tokenizer = corpus.train_tokenizer([corpus.read(file)], 300)
    pieces = corpus.cut(file, tokenizer, 7)
    assert {len(piece) for piece in pieces[:-1]} == {7}
    tokens = [token for piece in pieces for token in piece]
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1]) == "import os\n" * 20 + "\n"


def test_python_without_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds only 0 source files"):
        corpus.source_files(tmp_path)


def test_missing_matplotlib_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--smoke", "--output_dir", str(tmp_path / "out")])
    assert "pip install 'ebft[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
