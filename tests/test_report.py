"""The report without a browser: numbers against independent ones, runs that are not whole, what is refused."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from ebft.cli import main
from ebft.report import write_report
from ebft.report.page import encode, page
from ebft.report.rollouts import spread
from ebft.report.runs import read_run
from ebft.report.statistics import over_seeds, t_975
from report_folders import HOSTILE, LENGTHS, METHODS, P_VALUE, SOLVED, STEPS, TESTS, make_comparison, make_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return make_comparison(tmp_path_factory.mktemp("report") / "comparison")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def data_of(path) -> dict:
    """What a page shows, and its rollouts by step."""
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', path.read_text())
    found = {name: json.loads(text) for name, text in blocks}
    return {**found.pop("data"), "rollouts": [found[f"rollouts-{i}"] for i in range(len(found))]}


def report(*folders, **options) -> dict:
    with patch("ebft.report.page.plotly_source", return_value=""):  # packing it takes longer than all the rest
        return data_of(write_report(folders, **options))


def lines_of(data, section, title) -> dict[str, dict]:
    panel = next(panel for panel in data["panels"][section] if panel["title"].startswith(title))
    return {line["name"]: line for line in panel["lines"]}


def table_of(data, section, title) -> dict[str, dict]:
    """First cell -> column -> cell."""
    table = next(table for table in data["tables"][section] if table["title"].startswith(title))
    return {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}


def rewrite(path, change) -> None:
    """Replace a table's rows by what `change` makes of each; rows that it makes None of go."""
    rows = [change(row) for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist([row for row in rows if row is not None]), path)


# --- numbers ---


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 10, 11, 12, 20, 50, 1000])
def test_points_of_the_t_distribution(degrees):
    assert t_975(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-5)


def test_interval_over_seeds():
    values = [1.0, 2.0, 4.0, 4.5]
    estimate = over_seeds(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert estimate == pytest.approx((np.mean(values), low, high, 4), rel=1e-4)
    assert over_seeds([3.0]) == (3.0, None, None, 1)
    assert np.isnan(over_seeds([1.0, float("inf")]).mean)
    assert np.isnan(over_seeds([1e200, -1e200]).mean) and np.isnan(over_seeds([1e308, 1e308]).mean)  # squares, sum


@pytest.mark.parametrize("split", TESTS)
def test_results_are_those_of_the_table(comparison, split):
    data = report(comparison)
    rows = pq.read_table(comparison / "results.parquet").to_pandas()
    final = rows[(rows.split == split) & rows.selected]
    table = table_of(data, "results", f"Results on {split}")
    assert list(table) == ["cross_entropy/answer", "cross_entropy/all", SOLVED, "problems/sampled/pass@4"] + [
        f"feature_matching_loss, length {length}" for length in LENGTHS
    ]
    for name, cells in table.items():
        measure, _, length = name.partition(", length ")
        here = final[
            (final.measure == measure) & (final.length.isna() if not length else final.length == float(length or 0))
        ]
        for method in METHODS:
            values = here[here.method == method]["mean"]
            half = scipy.stats.t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
            expected = {"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half, "seeds": 3}
            assert cells[method] == pytest.approx(expected, rel=1e-5)
        assert cells["base"]["seeds"] == 1 and cells["base"]["low"] is None


@pytest.mark.parametrize("split", TESTS)
def test_differences_are_those_of_the_table(comparison, split):
    table = table_of(report(comparison), "results", f"Paired differences on {split}")
    assert list(table) == [SOLVED, "feature_matching_loss, length 8", "BLEU"]
    names = [f"{b} - {a}" for a, b in itertools.combinations(("base", *METHODS), 2)]
    assert all(list(cells) == ["measure", *names] for cells in table.values())
    for row in pq.read_table(comparison / "paired.parquet").to_pylist():
        if row["split"] == split and row["measure"] != "feature_matching_loss":
            expected = {name: row[name] for name in ("mean", "low", "high")}
            assert table[row["measure"]][row["model"]] == {**expected, "seeds": 3, "p": row["p_value"]}
    assert table[SOLVED]["ebft - sft"]["p"] == P_VALUE


def test_tables_are_of_one_split_after_the_other(comparison):
    titles = [table["title"] for table in report(comparison)["tables"]["results"]]
    of_each = [(f"Results on {split} data", f"Paired differences on {split} data") for split in TESTS]
    assert titles == [*itertools.chain(*of_each), "Failed cells"]


def test_many_pairs_are_lines(tmp_path):
    folder = make_comparison(tmp_path / "comparison")
    row = pq.read_table(folder / "paired.parquet").to_pylist()[0] | {"split": "test"}
    rows = [row | {"model": f"m{i} - sft", "mean": float(i), "measure": m} for i in range(7) for m in ("x", "y")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "paired.parquet")
    table = table_of(report(folder), "results", "Paired differences")
    assert list(table) == [f"m{i} - sft" for i in range(7)]
    assert list(table["m5 - sft"]) == ["difference", "x", "y"] and table["m5 - sft"]["y"]["mean"] == 5
    rows = [row | {"model": f"m{i} - sft", "measure": f"x{j}"} for i in range(7) for j in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "paired.parquet")
    assert list(table_of(report(folder), "results", "Paired differences")) == [f"x{j}" for j in range(8)]


@pytest.mark.parametrize("change", ["missing", "half", "empty", "another", "odd"])
def test_differences_that_cannot_be_used_are_left_out(tmp_path, change):
    folder = make_comparison(tmp_path / "comparison")
    path = folder / "paired.parquet"
    row, whole = pq.read_table(path).to_pylist()[0], path.read_bytes()
    path.unlink()
    if change == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif change != "missing":
        odd = {"model": None, "measure": None, "length": "8", "mean": "x"}
        rows = {"empty": [], "another": [{"split": "test"}], "odd": [row | odd]}[change]
        pq.write_table(pa.Table.from_pylist(rows), path)
    titles = [table["title"] for table in report(folder)["tables"]["results"]]
    assert titles == [*(f"Results on {split} data" for split in TESTS), "Failed cells"]


def test_a_difference_without_an_interval(tmp_path):
    folder = make_comparison(tmp_path / "comparison")
    rewrite(folder / "paired.parquet", lambda row: row | {"low": float("nan"), "units": 1, "p_value": float("nan")})
    cell = table_of(report(folder), "results", "Paired differences")[SOLVED]["ebft - sft"]
    assert {name: cell[name] for name in ("low", "high", "seeds", "p")} == dict(low=None, high=None, seeds=1, p=None)


@pytest.mark.parametrize(
    ("title", "measure", "length"),
    [("Accuracy, greedy", SOLVED, None), ("Cross-entropy", "cross_entropy/answer", None)]
    + [("Feature-matching loss", "feature_matching_loss", 8)],
)
def test_curves_are_means_of_the_selected_setting(comparison, title, measure, length):
    rows = pq.read_table(comparison / "results.parquet").to_pandas()
    rows = rows[rows.selected & (rows.measure == measure) & (rows.split == "validation")]
    rows = rows if length is None else rows[rows.length == length]
    lines = lines_of(report(comparison), "training", title)
    assert list(lines) == ["base", *METHODS]
    for method in METHODS:
        by_step = rows[rows.method == method].groupby("step")
        steps = [0, *STEPS]  # the first is the base model
        assert lines[method]["x"] == {
            "step": steps,
            "documents": [8 * step for step in steps],
            "seconds": [2.5 * step for step in steps],
        }
        assert lines[method]["mean"] == pytest.approx([*lines["base"]["mean"], *by_step["mean"].mean()])
        half = scipy.stats.t.ppf(0.975, 2) * by_step["mean"].sem()
        low = lines[method]["low"]
        assert low[0] is None and low[1:] == pytest.approx(list(by_step["mean"].mean() - half), rel=1e-5)
    assert lines["base"]["level"] is True and len(lines["base"]["mean"]) == 1


def test_curves_of_equal_time_are_over_seeds(tmp_path):
    folder = make_comparison(tmp_path / "comparison")

    def own_steps(row):
        step = row["step"] + 3 * row["seed"] if row["part"] else 0
        return row | {"step": step, "documents": 8 * step}

    rewrite(folder / "results.parquet", own_steps)
    line = lines_of(report(folder), "training", "Cross-entropy")["ebft"]
    assert line["x"]["step"] == [0, 13, 23, 33, 43] and line["x"]["documents"][1:] == [104, 184, 264, 344]
    rows = pq.read_table(folder / "results.parquet").to_pandas()
    rows = rows[rows.selected & (rows.measure == "cross_entropy/answer") & (rows.split == "validation")]
    by_part = rows[rows.method == "ebft"].groupby("part")["mean"]
    assert line["mean"][1:] == pytest.approx(list(by_part.mean()))
    half = scipy.stats.t.ppf(0.975, 2) * by_part.sem()
    assert line["low"][1:] == pytest.approx(list(by_part.mean() - half), rel=1e-5)


def test_curves_of_tables_without_parts_are_by_step(tmp_path):
    folder = make_comparison(tmp_path / "comparison")
    lines = lines_of(report(folder), "training", "Cross-entropy")
    path = folder / "results.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["part"]), path)
    assert lines_of(report(folder), "training", "Cross-entropy") == lines


def test_loss_by_length_is_that_of_the_end(comparison):
    rows = pq.read_table(comparison / "results.parquet").to_pandas()
    rows = rows[(rows.split == "test") & (rows.method == "ebft") & rows.selected]
    rows = rows[rows.measure == "feature_matching_loss"]
    line = lines_of(report(comparison), "length", "Feature-matching")["ebft"]
    assert line["x"]["length"] == list(LENGTHS)
    assert line["mean"] == pytest.approx(list(rows.groupby("length")["mean"].mean()))


def test_before_a_setting_is_chosen_each_stands_for_itself(tmp_path):
    folder = make_comparison(tmp_path / "comparison")
    rewrite(
        folder / "results.parquet",
        lambda row: row | {"selected": False} if row["split"] == "validation" else None,
    )
    data = report(folder)
    names = ["base", "sft", "rlvr", "ebft (learning_rate=0.0001)", "ebft (learning_rate=0.001)"]
    assert list(lines_of(data, "training", "Cross-entropy")) == data["groups"] == names
    assert list(lines_of(data, "rewards", "Entropy")) == names[1:]
    assert table_of(data, "results", "Results on validation")["cross_entropy/all"][names[-1]]["seeds"] == 1
    titles = [table["title"] for table in data["tables"]["results"]]
    assert titles == ["Results on validation data", "Failed cells"]  # differences there are of an earlier call


def test_after_the_first_cell_of_a_comparison(tmp_path):
    """`ebft compare` writes the table after each cell: of the base model and of the other cells there is nothing."""
    folder = make_comparison(tmp_path / "comparison")
    (folder / "paired.parquet").unlink()

    def first_cell(row):
        mine = row["method"] == "ebft" and row["selected"] and row["seed"] == 0 and row["split"] == "validation"
        return row | {"selected": False} if mine else None

    rewrite(folder / "results.parquet", first_cell)
    for path in (folder / "cells").glob("*-1"):  # not begun
        shutil.rmtree(path)
    data = report(folder)
    first, other = "ebft (learning_rate=0.0001)", "ebft (learning_rate=0.001)"
    assert data["groups"] == [first, other, "rlvr", "sft"]
    for title in ("Accuracy, greedy", "Cross-entropy", "Feature-matching loss"):
        lines = lines_of(data, "training", title)
        assert list(lines) == [first] and lines[first]["x"]["step"] == list(STEPS)
        assert lines[first]["low"] == [None] * len(STEPS)
    assert list(lines_of(data, "length", "Feature-matching")) == [first]
    assert list(lines_of(data, "rewards", "Entropy")) == data["groups"]
    table = table_of(data, "results", "Results on validation")
    assert list(table[SOLVED]) == ["measure", first] and table[SOLVED][first]["seeds"] == 1
    pq.write_table(pa.Table.from_pylist([]), folder / "results.parquet")
    assert report(folder)["groups"] == data["groups"]


def test_a_comparison_can_be_run_again(comparison):
    (command,) = report(comparison)["commands"]
    assert command.startswith("ebft compare --config ") and "compare.yaml --output_dir" in command


def test_another_table_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"method": "sft", "score": 1.0}]), tmp_path / "results.parquet")
    with pytest.raises(ValueError, match=r"results.parquet: the columns \['setting', .*'selected'\] are missing"):
        write_report([tmp_path])


def test_failed_cells_are_shown_with_their_errors(comparison):
    failed = table_of(report(comparison), "results", "Failed")
    assert list(failed) == ["ebft"]
    assert failed["ebft"]["seed"] == 2 and failed["ebft"]["error"] == "loss=nan at step 7: lower learning_rate"


def test_a_run_by_itself(run):
    data = report(run)
    assert (run / "report.html").exists() and not list(run.glob("*.unfinished"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    lines = next(p for p in data["panels"]["training"] if p["title"] == "Cross-entropy")["lines"]
    held_out, trained = lines
    assert (held_out["name"], trained["name"]) == ("run, held out", "run, training")
    assert trained["mean"] == [record["ce_loss"] for record in training]
    assert held_out["mean"] == [r["eval_ce_loss/answer"] for r in records if "eval_ce_loss/answer" in r]
    assert held_out["x"] == {"step": [4, 8, 12], "documents": [32, 64, 96], "seconds": [8, 16, 24]}
    assert all(not panel["lines"] and panel["empty"] for panel in data["panels"]["training"][:2])
    last = table_of(data, "metrics", "Last metrics")
    assert last["entropy"]["run"] == training[-1]["entropy"]
    assert last["eval_feature_matching_loss"]["run"] == pytest.approx(0.78)
    about = table_of(data, "about", "Runs")["run"]
    assert (about["steps"], about["state"], about["method"], about["model"]) == (
        "12 of 12",
        "done",
        "ebft",
        "some/model",
    )
    assert "resolved_config.yaml" in data["commands"][0]


@pytest.mark.parametrize(
    ("settings", "method"),
    [({"method": "sft"}, "sft"), ({"method": "rlvr"}, "rlvr"), ({"method": ["rlvr"]}, "ebft"), ({}, "ebft")]
    + [({"rl_coef": 0.0}, "sft")],
)
def test_method_of_a_run_is_that_of_its_settings(tmp_path, settings, method):
    data = report(make_run(tmp_path / "run", contexts=0, settings=settings))
    assert table_of(data, "about", "Runs")["run"]["method"] == method


def test_runs_that_differ_in_their_seed_are_one_line(tmp_path):
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in range(3)]
    other = make_run(tmp_path / "sft", contexts=0, settings={"rl_coef": 0.0})
    data = report(*runs, other, output_file=tmp_path / "r.html")
    assert data["groups"] == ["seed0 and 2 more seeds", "sft"]
    lines = lines_of(data, "rewards", "Entropy")
    texts = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
    values = [[json.loads(line)["entropy"] for line in text if "entropy" in line] for text in texts]
    assert lines["seed0 and 2 more seeds"]["mean"] == pytest.approx(list(np.mean(values, axis=0)))
    assert lines["sft"]["low"] == [None] * 12
    settings = next(iter(data["tables"]["settings"]))
    assert {row[0] for row in settings["rows"][:3]} == {"output_dir", "seed", "rl_coef"}
    assert settings["note"].startswith("The first 3 differ")


def test_unlogged_steps_count_as_long_as_the_next_logged_one(tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text('{"step": 5, "loss": 1}\n{"step": 10, "loss": 1}\n')
    tmp_path.joinpath("timing.jsonl").write_text('{"step": 5, "step_time": 2}\n{"step": 10, "step_time": 3}\n')
    assert lines_of(report(tmp_path), "cost", "Training time")[tmp_path.name]["mean"] == [10, 25]


def test_an_evaluation_beside_a_run(run, tmp_path):
    about = {"measure": "feature_matching_loss", "low": 0.1, "high": 0.9, "units": 3}
    rows = [{"model": m, "length": n, "mean": 0.5, **about} for m in ("a", "b", "a - b") for n in (4, 1)]
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps({"results": rows}))
    for data in (report(run), report(run / "evaluation", output_file=tmp_path / "r.html")):
        lines = lines_of(data, "length", "Feature-matching")
        assert set(lines) == {"a (evaluation)", "b (evaluation)"}
        assert lines["a (evaluation)"]["x"]["length"] == [1, 4]


# --- rollouts ---


def test_rollouts_are_those_of_the_file(run):
    data = report(run)
    assert [step["step"] for step in data["steps"]] == [3, 6, 9, 12]
    rows = pq.read_table(run / "rollouts" / "step_000006.parquet").to_pylist()
    shown = data["rollouts"][1]
    assert [c["context"] for c in shown] == [row["context"] for row in rows[::4]]
    rollout, row = shown[1]["rollouts"][2], rows[6]
    assert rollout["tokens"] == row["token_texts"]
    assert rollout["log_probs"] == pytest.approx(row["token_log_probs"], abs=0.005)
    assert rollout["advantage"] == pytest.approx(row["advantage"], rel=1e-3)


def test_rows_without_tokens_are_shown_as_one_text(run):
    for path in (run / "rollouts").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["token_texts", "token_log_probs"]), path)
    rollout = report(run)["rollouts"][0][0]["rollouts"][0]
    row = pq.read_table(run / "rollouts" / "step_000003.parquet").to_pylist()[0]
    assert (rollout["tokens"], rollout["log_probs"]) == ([row["completion"]], [])


@pytest.mark.parametrize(("most", "kept"), [(96, [6] * 4), (48, [3] * 4), (16, [1] * 4), (0, []), (41, [2, 2, 3, 3])])
def test_too_many_rollouts_are_spread_evenly(run, most, kept):
    data = report(run, max_rollouts=most)
    assert [step["kept"] for step in data["steps"]] == kept
    assert all(step["contexts"] == 6 for step in data["steps"])
    assert [len(contexts) for contexts in data["rollouts"]] == kept


def test_spread():
    assert spread(range(10), 3) == [0, 4, 9]
    assert spread("abc", 5) == ["a", "b", "c"]
    assert spread("abc", 1) == ["a"] and spread("abc", 0) == []


# --- runs that are not whole ---


def test_nothing_but_settings(tmp_path):
    (tmp_path / "resolved_config.yaml").write_text("model_name_or_path: m\n")
    data = report(tmp_path)
    assert all(not panel["lines"] for panels in data["panels"].values() for panel in panels)
    assert data["steps"] == [] and table_of(data, "about", "Runs")[tmp_path.name]["state"] == "running, or stopped"


def test_half_written_files(run):
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(run / name, "ab") as file:
            file.write(b'not json\n[1]\n{"loss": 1}\n{"step": 13, "lo\xff')
    whole = (run / "rollouts" / "step_000003.parquet").read_bytes()
    (run / "rollouts" / "step_000015.parquet").write_bytes(whole[: len(whole) // 2])
    (run / "rollouts" / "unfinished").write_bytes(whole)
    (run / "resolved_config.yaml").write_text("model_name_or_path: [")
    data = report(run)
    assert [step["step"] for step in data["steps"]] == [3, 6, 9, 12]
    assert lines_of(data, "rewards", "Entropy")["run"]["x"]["step"] == list(range(1, 13))


@pytest.mark.parametrize(
    "odd",
    [
        {"context": None},
        {"context": 3},
        {"document_id": None},
        {"document_id": [1]},
        {"reference": b"bytes"},
        {"completion": None},
    ],
)
def test_rollouts_without_what_every_context_has_are_left_out(run, odd):
    path = run / "rollouts" / "step_000003.parquet"
    rewrite(path, lambda row: row | odd)
    assert [step["step"] for step in report(run)["steps"]] == [6, 9, 12]
    rewrite(path, lambda row: {name: value for name, value in row.items() if name not in odd})
    assert [step["step"] for step in report(run)["steps"]] == [6, 9, 12]


def test_files_of_rollouts_that_are_something_else_are_left_out(run):
    pq.write_table(pa.Table.from_pylist([]), run / "rollouts" / "step_000003.parquet")
    table = pq.read_table(run / "rollouts" / "step_000006.parquet")
    no_text = pa.array([b"\xff"] * len(table)).view(pa.string())  # is no UTF-8
    table = table.set_column(table.column_names.index("context"), "context", no_text)
    pq.write_table(table, run / "rollouts" / "step_000006.parquet")
    shutil.copy(run / "rollouts" / "step_000012.parquet", run / "rollouts" / "step_\u00b2.parquet")
    assert [step["step"] for step in report(run)["steps"]] == [9, 12]


@pytest.mark.parametrize(
    ("odd", "shown"),
    [
        ({"feature_matching_loss": None}, {}),
        ({"feature_matching_loss": "x"}, {}),
        ({"token_log_probs": [None, -1.0]}, {"log_probs": [None, -1.0]}),
        ({"token_log_probs": "x"}, {"log_probs": []}),
        ({"token_texts": ["a", None]}, {"log_probs": []}),
        ({"token_texts": "ab"}, {"log_probs": []}),
        ({"reward": "x", "alignment": None, "diversity": True}, {}),
    ],
)
def test_odd_values_of_rollouts_are_left_out(run, odd, shown):
    path = run / "rollouts" / "step_000003.parquet"
    row = pq.read_table(path).to_pylist()[0]
    rewrite(path, lambda row: row | odd)
    data = report(run)
    context, other = data["rollouts"][0][0], data["rollouts"][1][0]
    rollout = context["rollouts"][0]
    assert [step["step"] for step in data["steps"]] == [3, 6, 9, 12]
    assert (context["loss"] is None) == ("feature_matching_loss" in odd) and other["loss"] is not None
    assert {name: rollout[name] for name in shown} == shown
    assert rollout["tokens"] == ([row["completion"]] if "token_texts" in odd else row["token_texts"])
    assert not odd.keys() & {"reward", "alignment", "diversity"} & rollout.keys()


@pytest.mark.parametrize(
    "text",
    ["seed: [1, 2]", "seed: {a: 1}", "seed: x", "seed: 1.5", "seed: true", "seed: !!int ''", "seed: !!bool x"]
    + ["seed: !!timestamp x", "[" * 2000, "1: 2\nb: 3", "per_device_train_batch_size: many", "method: [1]"]
    + [f"per_device_train_batch_size: {'9' * 400}", f"max_steps: {'9' * 400}", "? [a]\n: b"],
)
def test_odd_settings(tmp_path, text):
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    (runs[0] / "resolved_config.yaml").write_text(text)
    data = report(*runs, output_file=tmp_path / "r.html")
    assert data["groups"] == ["a", "b and 1 more seeds"]
    about = table_of(data, "about", "Runs")
    assert about["a"]["seed"] is None and about["b"]["seed"] == 1
    assert len(lines_of(data, "rewards", "Entropy")["a"]["mean"]) == 12


def test_numbers_that_no_float_can_hold(run):
    huge = "9" * 400
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 13, "entropy": {huge}, "ce_loss": 2.5}}\n{{"step": {huge}, "ce_loss": 1}}\n')
        file.write(f'{{"step": true, "ce_loss": 1}}\n{"[" * 100_000}\n')
    with open(run / "timing.jsonl", "a") as file:
        file.write(f'{{"step": 13, "step_time": {huge}}}\n{{"step": 15, "step_time": {"9" * 308}}}\n')
    data = report(run)
    assert lines_of(data, "rewards", "Entropy")["run"]["x"]["step"] == list(range(1, 13))
    assert lines_of(data, "training", "Cross-entropy")["run, training"]["mean"][-1] == 2.5
    assert table_of(data, "metrics", "Last metrics")["ce_loss"]["run"] == 2.5


def test_folders_in_place_of_files(run):
    for name in ("metrics.jsonl", "resolved_config.yaml", "rollouts/step_000003.parquet"):
        (run / name).unlink()
        (run / name).mkdir()
    data = report(run)
    assert [step["step"] for step in data["steps"]] == [6, 9, 12]
    assert lines_of(data, "cost", "Time per step")["run"]["mean"]


@pytest.mark.parametrize(
    "odd",
    [{"method": None}, {"setting": [1]}, {"seed": [1]}, {"step": None}, {"measure": 3}, {"length": "8"}]
    + [{"split": None}, {"mean": "x"}],
)
def test_results_that_do_not_say_what_they_are_of_are_left_out(tmp_path, odd):
    folder = make_comparison(tmp_path / "comparison")
    (folder / "paired.parquet").unlink()
    rewrite(folder / "results.parquet", lambda row: row | odd)
    data = report(folder)
    assert [table["title"] for table in data["tables"]["results"]] == ["Failed cells"]
    assert lines_of(data, "rewards", "Entropy")


def test_odd_cells_of_a_comparison(tmp_path):
    folder = make_comparison(tmp_path / "comparison")
    for place, path in enumerate(sorted((folder / "cells").glob("ebft-0.0001-*"))):
        odd = [{"method": [1]}, {"setting": {"a": 1}}, {"seed": [1], "status": ["x"]}][place]
        cell = json.loads((path / "cell.json").read_text()) | odd
        (path / "cell.json").write_text(json.dumps(cell))
    data = report(folder)
    assert data["groups"] == ["base", *METHODS]
    assert table_of(data, "about", "Runs")["ebft-0.0001-2"]["seed"] is None


def test_odd_evaluation(run):
    rows = [{"model": "a", "measure": "feature_matching_loss", "length": n, "mean": 0.5} for n in (1, 4)]
    rows[0] |= {"low": "x", "high": [1]}
    (run / "results.json").write_text(json.dumps({"results": [*rows, 1, {"model": "b", "mean": 10**400}]}))
    lines = lines_of(report(run), "length", "Feature-matching")
    assert list(lines) == ["a (evaluation)"] and lines["a (evaluation)"]["low"] == [None, None]


def test_a_comparison_that_has_just_begun(tmp_path):
    cell = tmp_path / "c" / "cells" / "ebft-0"
    cell.mkdir(parents=True)
    (tmp_path / "c" / "results.parquet").write_bytes(b"PAR1")
    (cell / "cell.json").write_text(
        '{"method": "ebft", "setting": "x=1", "seed": 0, "status": "running", "error": null}'
    )
    data = report(tmp_path / "c")
    assert data["groups"] == ["ebft"] and data["tables"]["results"] == []
    (cell / "cell.json").write_text('{"method": "eb')
    assert report(tmp_path / "c")["groups"] == []


def test_numbers_that_are_not_finite(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "entropy": NaN, "ce_loss": Infinity}\n')
    data = report(run)
    assert lines_of(data, "rewards", "Entropy")["run"]["mean"][-1] is None
    assert table_of(data, "metrics", "Last metrics")["entropy"]["run"] == "nan"


# --- text that means harm ---


@pytest.mark.parametrize("text", [*HOSTILE, "lone \ud800 surrogate", "%%DATA%%"])
def test_no_text_leaves_its_element(text):
    encoded = encode({text: [text]})
    assert json.loads(encoded) == {text: [text]}
    assert encoded.isascii() and not set("<>&") & set(encoded)
    whole = page(text, {"text": text}, [[text]])
    assert whole.isascii()
    assert "<img" not in whole and whole.count("</script>") == 6  # data, a step, plotly, three of ours


def test_file_is_one_and_asks_for_nothing(run):
    text = write_report([run]).read_text()
    assert "default-src 'none'" in text
    head, _, rest = text.partition("<body>")
    assert not re.findall(r"<(?:link|img|iframe|script)[^>]+(?:src|href)=", head + rest.partition('id="plotly"')[0])


# --- the command ---


def test_command_imports_neither_torch_nor_transformers(run):
    code = (
        "import sys; from ebft.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & sys.modules.keys(); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Report: {run / 'report.html'} (")


def test_default_file_of_several_runs_is_in_the_working_folder(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / "a" / "x"), make_run(tmp_path / "b" / "x")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    rows = table_of(data_of(tmp_path / "report.html"), "about", "Runs")
    assert list(rows) == ["a/x", "b/x"]  # told apart


def test_a_run_that_goes_on_behind_its_end_is_not_finished(run):
    assert read_run(run, "run").finished
    with open(run / "timing.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, "step_time": 2.0}) + "\n")
    assert not read_run(run, "run").finished
    (run / "timing.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    assert not read_run(run, "run").finished


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN; see `ebft report --help`"),
        (["nowhere"], "RUN='nowhere' does not exist: name the output_dir"),
        (["file.txt"], "RUN='file.txt' is a file: name the folder it is in"),
        (["."], "RUN='.' holds neither resolved_config.yaml"),
        (["run", "--output", "x"], "unrecognized arguments: --output x"),
        (["run", "--max_rollouts", "-1"], "max_rollouts=-1 must be at least 0"),
        (["run", "--output_file", "no/such/folder.html"], "output_file='no/such/folder.html' cannot be written"),
    ],
)
def test_mistakes_are_one_line(words, message, run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    (run.parent / "file.txt").write_text("")
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_without_plotly_it_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'ebft[report]'" in capsys.readouterr().err
