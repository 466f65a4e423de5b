"""`ebft compare`: cells that survive each other, choice on validation data, tables over seeds, and what it refuses."""

import csv
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy import stats

from ebft.callbacks import TrainingClock
from ebft.cli import main
from ebft.compare import cell_process, jobs, markdown, tables
from ebft.compare.cells import Cell, cells_of
from ebft.compare.config import CompareConfig
from ebft.compare.selection import choose
from ebft.compare.workers import last_line
from ebft.evaluation.intervals import DocumentMean
from ebft.evaluation.report import locked
from planted import files_with_secret, plant
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

WORDS = ("one", "two", "three", "four")
REWARD = "def reward(prompts, completions, **columns):\n    {body}\n"
BROKEN = REWARD.format(body="raise KeyError('no such luck')")
MENDED = REWARD.format(body="return [float(len(text)) for text in completions]")
CE = "cross_entropy/answer"
CLOCK = {"documents": None, "train_seconds": 3.0}


def write(path: Path, count: int, start: int) -> None:
    rows = [
        {"prompt": f"count {WORDS[i % 4]} and then {i}:", "completion": f" {WORDS[(i + 1) % 4]} {WORDS[(i + 2) % 4]}"}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model, three splits, a reward that fails, and what is to be compared."""
    folder, tokenizer = tmp_path_factory.mktemp("compare"), byte_bpe_tokenizer()
    tiny_model(seed=0, vocab_size=len(tokenizer), dtype=torch.float32).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, count, start in (("train", 12, 0), ("validation", 4, 100), ("test", 5, 200)):
        write(folder / f"{name}.jsonl", count, start)
    write(folder / "copy.jsonl", 12, 0)  # of train.jsonl
    (folder / "reward_of_mine.py").write_text(BROKEN)
    evaluation = {"metrics": ["cross_entropy"]}
    features = {"lengths": [1, 2], "context_length": 3, "num_generations": 2, "contexts_per_document": 1}
    config = {
        "model_name_or_path": "base",
        "dataset_name": "train.jsonl",
        "documents": 16,
        "seeds": [3, 4],
        "checkpoints": 2,
        "workers": 2,
        "output_dir": "out",
        "train": {"max_length": 64, "use_cpu": True, "per_device_train_batch_size": 4, "disable_tqdm": True}
        | {"gradient_accumulation_steps": 1},
        "methods": {
            "sft": {"grid": {"learning_rate": [1e-2]}},
            "rlvr": {"reward": "reward_of_mine.reward", "max_completion_length": 4, "grid": {"learning_rate": [1e-4]}},
            "ebft": {"stride": 4, "completion_length": 2, "context_length": 4, "grid": {"learning_rate": [1e-2]}},
        },
        "validation": {"dataset_name": "validation.jsonl", **evaluation},
        "test": {"dataset_name": "test.jsonl", "metrics": ["cross_entropy", "feature_matching"], **features},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    return workplace


@pytest.fixture(scope="module")
def compared(workplace, tmp_path_factory):
    """The comparison, run twice: with a reward that fails, then with one that does not; what was said and written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("PYTHONPATH", str(workplace))
        plant(patch)
        first = main(["compare", "--config", "c.yaml"])
        states = {path.parent.name: json.loads(path.read_text()) for path in Path("out/cells").glob("*/cell.json")}
        summary = pq.read_table("out/summary.parquet").to_pylist()
        (workplace / "reward_of_mine.py").write_text(MENDED)
        before = {path: path.stat().st_mtime_ns for path in Path("out/cells").glob("[se]*/checkpoint-*/*.safetensors")}
        second = main(["compare", "--config", "c.yaml"])
        after = {path: path.stat().st_mtime_ns for path in before}
    return {"first": first, "second": second, "states": states, "summary": summary, "untouched": before == after}


def test_a_run_that_fails_does_not_stop_the_others(compared):
    assert compared["first"] == 2
    states = compared["states"]
    assert {name: state["status"] for name, state in states.items()} == {
        f"{method}-learning_rate={rate}-seed{seed}": status
        for (method, rate, status), seed in product(
            [("sft", 0.01, "done"), ("rlvr", 0.0001, "failed"), ("ebft", 0.01, "done")], [3, 4]
        )
    }
    assert all("no such luck" in state["error"] for state in states.values() if state["status"] == "failed")
    assert {row["model"] for row in compared["summary"]} == {"base", "sft", "ebft"}


def test_the_same_command_tries_failed_runs_again_and_no_others(compared, workplace):
    assert compared["second"] == 0 and compared["untouched"]
    rows = pq.read_table(workplace / "out" / "summary.parquet").to_pylist()
    assert {row["model"] for row in rows} == {"base", "sft", "rlvr", "ebft"}


def test_files_hold_no_secret_of_the_environment(compared, workplace):
    assert files_with_secret(workplace / "out") == []


def test_numbers_are_those_of_the_runs(compared, workplace):
    with open(workplace / "out" / "summary.csv", newline="") as file:
        summary = {(row["model"], row["measure"], row["length"]): row for row in csv.DictReader(file)}
    for method, rate in (("sft", "0.01"), ("ebft", "0.01"), ("rlvr", "0.0001")):
        found = []
        for seed in (3, 4):
            cell = workplace / "out" / "cells" / f"{method}-learning_rate={rate}-seed{seed}"
            (path,) = cell.glob("test-checkpoint-*/results.json")
            (row,) = (row for row in json.loads(path.read_text())["results"] if row["measure"] == CE)
            found.append(row["mean"])
        row, half = summary[method, CE, ""], 12.7062 * abs(found[0] - found[1]) / 2  # t(0.975; 1), standard error
        assert float(row["mean"]) == pytest.approx(np.mean(found))
        assert float(row["high"]) - float(row["mean"]) == pytest.approx(half, rel=1e-4, abs=1e-9)
        assert (row["units"], float(row["documents"]) in (8.0, 16.0)) == ("2", True)
        assert float(row["train_seconds"]) > 0
    assert float(summary["sft", CE, ""]["mean"]) < float(summary["base", CE, ""]["mean"]) - 0.1
    assert ("sft", "feature_matching_loss", "2") in summary


def test_differences_are_paired_and_tested(compared, workplace):
    pairs = pq.read_table(workplace / "out" / "paired.parquet").to_pylist()
    (row,) = (row for row in pairs if (row["model"], row["measure"]) == ("sft - base", CE))
    summary = pq.read_table(workplace / "out" / "summary.parquet").to_pylist()
    means = {row["model"]: row["mean"] for row in summary if row["measure"] == CE}
    assert row["mean"] == pytest.approx(means["sft"] - means["base"])
    assert row["p_value"] == pytest.approx(2 / 2**5, abs=0.02)  # all five differ in one direction
    assert {"rlvr - sft", "ebft - sft", "ebft - rlvr"} <= {row["model"] for row in pairs}


def test_validation_alone_chooses(compared, workplace):
    rows = pq.read_table(workplace / "out" / "results.parquet").to_pylist()
    chosen = yaml.safe_load((workplace / "out" / "chosen.yaml").read_text())
    assert chosen["chosen_by"] == "cross_entropy/answer, on validation data, mean over seeds"
    for method in ("sft", "ebft", "rlvr"):
        by_part: dict[int, list[float]] = {}
        for row in rows:
            if (row["method"], row["measure"], row["split"]) == (method, CE, "validation"):
                by_part.setdefault(row["part"], []).append(row["mean"])
        best = min(by_part, key=lambda part: np.mean(by_part[part]))
        assert chosen[method]["part"] == best and len(by_part) == 2
        assert {row["part"] for row in rows if row["method"] == method and row["split"] == "test"} == {best}
    steps = {(row["part"], row["step"], row["documents"]) for row in rows if row["method"] == "ebft"}
    assert steps == {(1, 2, 8), (2, 4, 16)}


def test_a_report_shows_the_comparison(compared, here):
    pytest.importorskip("plotly")
    assert main(["report", "out", "--output_file", "report.html"]) == 0
    assert "sft" in Path("report.html").read_text()


def test_other_settings_are_not_mixed(compared, here, capsys):
    config = yaml.safe_load(Path("c.yaml").read_text())
    config["train"]["max_length"] = 32
    Path("other.yaml").write_text(yaml.safe_dump(config))
    assert main(["compare", "--config", "other.yaml"]) == 2
    assert "was begun with other settings (max_length 64 -> 32)" in capsys.readouterr().err
    write(here / "train.jsonl", 13, 0)
    assert main(["compare", "--config", "c.yaml"]) == 2
    assert "was begun with other settings (the training data)" in capsys.readouterr().err
    write(here / "train.jsonl", 12, 0)
    write(here / "validation.jsonl", 5, 100)
    assert main(["compare", "--config", "c.yaml"]) == 2
    assert "was begun with other settings (the validation, or the base model)" in capsys.readouterr().err
    write(here / "validation.jsonl", 4, 100)


def test_another_choice_is_measured_beside_the_first(compared, here):
    assert main(["compare", "--config", "c.yaml", "--checkpoint", "last"]) == 0
    rows = pq.read_table("out/results.parquet").to_pylist()
    assert {row["part"] for row in rows if row["split"] == "test" and row["method"] != "base"} == {2}
    assert yaml.safe_load(Path("out/chosen.yaml").read_text())["sft"]["part"] == 2
    assert main(["compare", "--config", "c.yaml"]) == 0


def test_one_failing_measurement_does_not_lose_the_tables(compared, here, capsys):
    config = yaml.safe_load(Path("c.yaml").read_text())
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": 3}\n')
    config["more_tests"] = {"far": {"dataset_name": "bad.jsonl", "metrics": ["cross_entropy"]}}
    Path("far.yaml").write_text(yaml.safe_dump(config))
    Path("out/summary.csv").unlink()
    assert main(["compare", "--config", "far.yaml"]) == 2
    assert "7 measurements on test data failed (out/base/far: " in capsys.readouterr().err
    assert '"sft","learning_rate=0.01"' in Path("out/summary.csv").read_text()


def test_a_cell_that_is_done_is_left_alone(compared, here):
    folder = Path("out/cells/sft-learning_rate=0.01-seed3").absolute()
    before = (folder / "cell.json").stat().st_mtime_ns
    assert cell_process.run(cell_process.read(folder), Path("out/validation.yaml")) == 0
    assert (folder / "cell.json").stat().st_mtime_ns == before


def test_a_cell_killed_while_it_is_slimmed_is_done(tmp_path, monkeypatch):
    """Its checkpoints are no longer those that were measured."""
    cell = Cell("sft", "", 0, {}, tmp_path)
    for name in ("train", "measure"):
        monkeypatch.setattr(cell_process, name, lambda *given: None)
    monkeypatch.setattr(cell_process, "slim", lambda cell: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cell_process.run(cell, tmp_path / "validation.yaml")
    assert cell.status()["status"] == "done"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {}}, "methods: missing"),
        ({"documents": None}, "documents, train_seconds: give one of them"),
        ({"train_seconds": 3.0}, "documents, train_seconds: give one of them"),
        (CLOCK | {"train": {"warmup_steps": 0.03}}, "warmup_steps=0.03 is a share of a number of steps"),
        (CLOCK | {"train": {"lr_scheduler_type": "cosine"}}, "lr_scheduler_type='cosine' needs the number of steps"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: give different numbers"),
        ({"checkpoint": "first"}, "checkpoint='first': use best or last"),
        ({"against": "sfd"}, "against='sfd': no method of this comparison ("),
        ({"methods": {"ppo": {}}}, "methods.ppo.method='ppo': use one of ebft, sft, rlvr"),
        ({"methods": {"base": {}}}, "methods.base: make the name"),
        ({"methods": {"sft": {"grid": {"learning_rate": [1, 2]}}, "ebft": {}}}, "(sft 2, ebft 1): tune all alike"),
        ({"methods": {"sft": {"grid": {"learning_rate": 1}}}}, "methods.sft.grid.learning_rate=1: give a list"),
        ({"methods": {"sft": {"seed": 1}}}, "methods.sft.seed: the comparison sets it"),
        ({"methods": {"sft": {"grid": {"max_steps": [1]}}}}, "methods.sft.max_steps: the comparison sets it"),
        ({"methods": {"sft": {"learning_rate": "fast"}}}, "(no grid): --learning_rate/--learning-rate: invalid float"),
        ({"methods": {"sft": {"lerning_rate": 1}}}, "unknown option lerning_rate; did you mean learning_rate?"),
        ({"methods": {"rlvr": {}}}, "methods.rlvr (no grid): reward: missing"),
        ({"validation": {"dataset": "x"}}, "validation.dataset: no option of ebft evaluate"),
        (
            {"test": {"dataset_name": "validation.jsonl"}},
            "test.dataset_name='validation.jsonl': the same data as",
        ),
        ({"test": {"dataset_name": "copy.jsonl"}}, "the same data as dataset_name, and models are trained on it"),
        ({"more_tests": {"far": {"code_benchmark": ["copy.jsonl"]}}}, "more_tests.far.code_benchmark='copy.jsonl'"),
        ({"more_tests": {"base": {"dataset_name": "test.jsonl"}}}, "more_tests.base: make the name of letters"),
        ({"more_tests": {"../x": {"dataset_name": "test.jsonl"}}}, "more_tests.../x: make the name of letters"),
        ({"more_tests": {"far": None}}, "more_tests.far: None where lines `option: value` are expected"),
        ({"test": {"dataset_name": "tets.jsonl"}}, "test.dataset_name='tets.jsonl': there is no such file"),
        ({"model_name_or_path": "./bse"}, "model_name_or_path='./bse': there is no such folder"),
        ({"methods": {1: {"method": "sft"}}}, "methods.1: make the name of letters"),
        ({"methods": {"sft": {"grid": {"learning_rate": ["1e-4", 1e-4]}}}}, "give a list of different values"),
        ({"methods": {"sft": {"dataset_train_split": "x"}}}, "methods.sft.dataset_train_split: the comparison sets"),
        ({"methods": {"sft": {"grid": {"eval_split_size": [2]}}}}, "methods.sft.eval_split_size: the comparison sets"),
        ({"train": {"early_stopping_patience": 2}}, "train.early_stopping_patience: the comparison sets"),
        ({"output_dir": "c.yaml"}, "output_dir='c.yaml' is a file"),
        ({"methods": {"sft": {"grid": None}}}, "methods.sft.grid: None where lines"),
        ({"methods": {"sft": {"grid": [1e-4]}}}, "methods.sft.grid: [0.0001] where lines"),
        ({"methods": {"sft": {"dataset_name": "x"}}}, "methods.sft.dataset_name: the comparison sets it"),
        ({"methods": {"sft": {"stride": 2}}}, "methods.sft (no grid): stride=2 does nothing with method: sft"),
        (
            {"methods": {"rlvr": {"reward": "reward_of_mine.rward"}}},
            "reward='reward_of_mine.rward' cannot",
        ),
        ({"select": "cross_entropy/answr"}, "select='cross_entropy/answr' is not measured on the validation data"),
        ({"select": "feature_matching_loss"}, "it takes dataset_name, with feature_matching among the metrics"),
        (
            {
                "select": "feature_matching_loss/rbf",
                "validation": {"dataset_name": "validation.jsonl", "metrics": ["feature_matching"]},
            },
            "select='feature_matching_loss/rbf' is not measured on the validation data: it takes kernels, with rbf",
        ),
        ({"select": "x.jsonl/greedy/pass@1"}, "it takes a code_benchmark of that name (there are none)"),
        ({"test": {"dataset_name": "test.jsonl", "metrics": ["bleu"]}}, "test: metrics=['bleu']"),
        ({"select": "accuracy"}, "select='accuracy' is not measured on the validation data: it takes another name"),
        ({"select": "distinct_2"}, "it takes dataset_name, with diversity among the metrics"),
        ({"select": CE, "select_length": 3}, "select_length=3: not measured on the validation data, which has"),
    ],
)
def test_what_cannot_be_used_is_refused(compared, here, tmp_path, capsys, change, message):
    config = yaml.safe_load(Path("c.yaml").read_text())
    # What only the results can tell is asked of a comparison that is done.
    config["output_dir"] = "out" if "select_length" in change else str(tmp_path / "new")
    config = {key: value for key, value in {**config, **change}.items() if value is not None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["compare", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "new").glob("cells/*/metrics.jsonl"))


def test_budgets_are_equal_for_all_methods():
    common = {"model_name_or_path": "m", "dataset_name": "d", "validation": {"a": 1}, "test": {"b": 1}}
    methods = {
        "sft": {"grid": {"learning_rate": ["1e-5", "1e-4"]}},
        "mine": {"method": "ebft", "grid": {"ce_coef": [0, 1]}},
    }
    config = CompareConfig(**common, methods=methods, documents=100, seeds=[7], checkpoints=3)
    cells = cells_of(config)
    assert {(cell.options["max_steps"], cell.options["save_steps"]) for cell in cells} == {(7, 3)}
    assert [cell.options["method"] for cell in cells] == ["sft", "sft", "ebft", "ebft"]
    assert [cell.setting for cell in cells] == ["learning_rate=1e-5", "learning_rate=1e-4", "ce_coef=0", "ce_coef=1"]
    larger = {"sft": {}, "mine": {"method": "ebft", "per_device_train_batch_size": 8}}
    cells = cells_of(CompareConfig(**common, methods=larger, documents=100, seeds=[7], checkpoints=3))
    assert [cell.options["max_steps"] for cell in cells] == [7, 4]  # of 16 and of 32 documents
    by_clock = cells_of(CompareConfig(**common, methods=methods, train_seconds=60, checkpoints=3))
    assert {(c.options["max_train_seconds"], c.options["save_seconds"]) for c in by_clock} == {(60.0, 20.0)}
    # A share of all steps would be a warm-up without end.
    assert {c.options["warmup_steps"] for c in by_clock} == {5} and "warmup_steps" not in cells[0].options


def test_a_training_by_the_clock_is_over_when_its_last_checkpoint_says_so(tmp_path):
    cell = Cell("sft", "", 0, {"max_train_seconds": 10.0, "max_steps": 10**9}, tmp_path)
    for spent, over in ((9.9, False), (10.1, True)):
        write_checkpoint(tmp_path, int(spent * 10), spent)
        assert cell.is_trained() == over


def write_checkpoint(folder: Path, step: int, spent: float = 0.0) -> None:
    clock = {TrainingClock.__name__: {"args": {}, "attributes": {"spent": spent}}}
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "stateful_callbacks": clock}))


def test_a_checkpoint_of_a_run_that_was_told_to_stop_is_of_no_part(tmp_path):
    cell = Cell("sft", "", 0, {"max_steps": 7, "save_steps": 3}, tmp_path)
    for step in (2, 3, 5, 6):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in cell.checkpoints()] == ["checkpoint-3", "checkpoint-6"] and not cell.is_trained()
    write_checkpoint(tmp_path, 7)
    assert [path.name[-1] for path in cell.checkpoints()] == ["3", "6", "7"] and cell.is_trained()


def test_parts_of_a_training_by_the_clock_are_the_same_for_all_seeds(tmp_path):
    options = {"max_train_seconds": 3.0, "save_seconds": 3.0 / 7, "max_steps": 10**9, "save_steps": 10**9}
    cell = Cell("sft", "", 0, options, tmp_path)
    for step, spent in enumerate((0.2, 0.5, 0.6, 0.9, 1.3, 2.2, 2.6, 3.05), 1):  # told to stop at .2 and .6
        write_checkpoint(tmp_path, step, spent)
    assert [path.name[-1] for path in cell.checkpoints()] == ["2", "4", "5", "6", "6", "7", "8"]


def test_a_terminated_command_leaves_no_process_behind(tmp_path):
    text = "import os, time; open('part', 'w').write(str(os.getpid())); os.replace('part', 'pid'); time.sleep(99)"
    (tmp_path / "command.py").write_text(
        "from pathlib import Path\n"
        "from ebft.compare.workers import Workers\n"
        f"class Sleeper: arguments, log = ['-c', {text!r}], Path('log.txt')\n"
        "Workers([Sleeper()]).run(1)\n"
    )
    command = subprocess.Popen([sys.executable, "command.py"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    command.terminate()
    assert command.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_best_mean_over_seeds_is_chosen_and_lost_seeds_do_not_win():
    config = CompareConfig(
        model_name_or_path="m", dataset_name="d", methods={"sft": {}}, documents=1, validation={"a": 1}, test={"b": 1}
    )
    values = {("a", 1): (1.0, 3.0), ("a", 2): (2.5, 2.5), ("b", 1): (2.1, 1.8), ("b", 2): (0.1,)}
    rows = [
        {"method": "sft", "setting": s, "seed": i, "part": p, "measure": CE, "length": None, "mean": v}
        for (s, p), found in values.items()
        for i, v in enumerate(found)
    ]
    assert choose(config, rows) == {"sft": ("b", 1)}
    config.checkpoint = "last"
    assert choose(config, [row for row in rows if row["setting"] == "a"]) == {"sft": ("a", 2)}
    config.checkpoint, config.select = "best", "code/greedy/pass@1"
    found = [row | {"measure": config.select} for row in rows]
    assert choose(config, found) == {"sft": ("a", 2)}


@pytest.mark.parametrize(
    ("select", "lower"),
    [
        (CE, True),
        ("feature_matching_loss", True),
        ("wikitext/word_perplexity,none", True),
        ("x.jsonl/greedy/pass@1", False),
        ("arc_easy/acc,none", False),
    ],
)
def test_direction_of_a_measure(select, lower):
    common = {"model_name_or_path": "m", "dataset_name": "d", "validation": {"a": 1}, "test": {"b": 1}}
    assert CompareConfig(**common, methods={"sft": {}}, documents=1, select=select).lower_is_better() == lower


def test_intervals_and_sign_flips():
    values = [0.3, 0.5, 0.9]
    interval = stats.ttest_1samp(values, 0.0).confidence_interval()
    found = tables.t_interval(values)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert tables.t_interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "units": 1}
    differences = np.array([0.5, 1.0, -0.25, 0.75, 2.0, -0.5, 0.125, 1.5])
    flips = np.array(list(product([-1, 1], repeat=8))) @ differences
    assert tables.sign_flip(differences) == pytest.approx((np.abs(flips) >= differences.sum()).mean(), abs=1e-9)
    assert tables.sign_flip(np.zeros(4)) == 1.0


def test_units_are_paired_where_both_have_a_number():
    counts = torch.tensor([2.0, 0.0, 4.0])
    new = {"m": DocumentMean(torch.tensor([4.0, 0.0, 4.0]), counts)}
    old = {"m": DocumentMean(torch.tensor([2.0, 0.0, 8.0]), counts)}
    assert tables.unit_differences(new, old, "m").flatten().tolist() == pytest.approx([2 / 3, -4 / 3])
    other = {"m": DocumentMean(torch.tensor([2.0, 1.0, 8.0]), torch.ones(3))}
    assert tables.unit_differences(new, other, "m") is None and tables.unit_differences(new, {}, "m") is None


def test_seeds_are_paired_with_themselves_where_one_is_missing():
    def of(value: float) -> dict[str, DocumentMean]:
        return {"m": DocumentMean(torch.full((4, 1), value, dtype=torch.float64), torch.ones(4, dtype=torch.float64))}

    means = {("base", 0): of(5.0)} | {("sft", seed): of(10.0 * seed) for seed in (0, 1)}
    means |= {("ebft", seed): of(10.0 * seed + 1) for seed in (0, 1, 2)}
    rows = {row["model"]: row for row in tables.paired(means, {}, "test")}
    assert (rows["ebft - sft"]["units"], rows["ebft - sft"]["mean"]) == (2, 1.0)
    assert (rows["ebft - base"]["units"], rows["ebft - base"]["mean"]) == (3, 6.0)


def test_markdown_has_means_and_differences(tmp_path):
    about = {"split": "test", "length": None, "setting": "a=1", "documents": 8.0, "train_seconds": 2.0, "units": 2}
    summary = [
        about | {"model": m, "measure": "x|y", "mean": v, "low": None, "high": None}
        for m, v in (("ebft", 2), ("base", 1))
    ]
    summary += [
        about
        | {"model": "ebft", "measure": "feature_matching_loss", "length": 4, "mean": 0.5, "low": -2e-17, "high": 0.75}
    ]
    pairs = [{**summary[0], "model": "ebft - base", "mean": 1.0, "low": -0.5, "high": 2.5, "p_value": 0.25}]
    markdown.save(tmp_path / "tables.md", summary, pairs, ["base", "ebft"])
    text = (tmp_path / "tables.md").read_text()
    assert "| ebft | a=1 | 8 | 2 |" in text
    assert "|  | base | ebft |\n| --- | --- | --- |\n| x\\|y | 1 | 2 |\n" in text
    assert "| feature matching loss, length 4 | - | 0.5 [0, 0.75] |" in text
    assert "| x\\|y | +1 [-0.5, +2.5], p 0.25 |" in text


def test_corpus_scores_are_paired_by_seed():
    about = {"split": "test", "measure": "BLEU", "length": None}
    found = {("base", 0): 30.0, ("sft", 0): 32.0, ("sft", 1): 35.0, ("ebft", 1): 33.0, ("ebft", 0): 33.5}
    rows = [about | {"method": method, "seed": seed, "mean": mean} for (method, seed), mean in found.items()]
    pairs = {row["model"]: row for row in tables.paired_over_seeds(rows, known=[])}
    assert {name: row["mean"] for name, row in pairs.items()} == pytest.approx(
        {"sft - base": 3.5, "ebft - base": 3.25, "ebft - sft": -0.25}
    )
    differences = {"sft - base": [2.0, 5.0], "ebft - base": [3.0, 3.5], "ebft - sft": [-2.0, 1.5]}
    for name, values in differences.items():
        assert (pairs[name]["low"], pairs[name]["p_value"]) == (pytest.approx(tables.t_interval(values)["low"]), None)
    assert tables.paired_over_seeds(rows, known=[{"measure": "BLEU", "length": None}]) == []
    for measure in ("feature_matching_floor", "feature_matching_floor/rbf"):  # of the references alone
        assert tables.paired_over_seeds([row | {"measure": measure} for row in rows], known=[]) == []


def test_pairs_of_methods():
    names = ["base", "sft", "default", "gamma-0"]
    assert tables.pairs_of(names, None) == [
        *(("base", "sft"), ("base", "default"), ("base", "gamma-0")),
        *(("sft", "default"), ("sft", "gamma-0"), ("default", "gamma-0")),
    ]
    expected = [("base", "default"), ("default", "sft"), ("default", "gamma-0")]
    assert tables.pairs_of(names, "default") == expected
    assert tables.pairs_of(names[1:], "default") == expected[1:]
    assert tables.pairs_of(names, "failed") == []


def test_many_methods_are_lines(tmp_path):
    about = {"split": "test", "length": None, "setting": "", "documents": 8.0, "train_seconds": 2.0, "units": 2}
    about |= {"low": None, "high": None}
    names = [f"m{i}" for i in range(7)]
    rows = [about | {"model": n, "measure": m, "mean": float(i)} for i, n in enumerate(names) for m in ("x", "y")]
    markdown.save(tmp_path / "tables.md", rows, [], names)
    assert "|  | x | y |\n| --- | --- | --- |\n| m0 | 0 | 0 |\n| m1 | 1 | 1 |" in (tmp_path / "tables.md").read_text()


def test_a_measurement_waits_for_a_process_that_outlived_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.0)
    ended = []
    job = jobs.Measurement(tmp_path, lambda: ended.append(True))
    with locked(tmp_path):
        assert job.ended(2) is True and not ended
        assert job.ended(0) is False and len(ended) == 1
    assert job.ended(2) is False and len(ended) == 2  # free: what failed is told when the numbers are read


def test_the_last_line_of_a_log(tmp_path):
    (tmp_path / "log.txt").write_text("Traceback\nValueError: x=1 is bad\n\n")
    assert last_line(tmp_path / "log.txt") == "ValueError: x=1 is bad"
    assert last_line(tmp_path / "none") == ""
