"""The Q&A coding task: answers pass their tests, splits are apart, and habits are what they are said to be."""

import ast
import json
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from ebft.evaluation.code_benchmarks import load_problems
from ebft.pocket import qa_coding
from ebft.pocket.answers import NAMINGS, PRETRAIN, STYLES, TASK, answer, body
from ebft.pocket.operations import AGGREGATES, FILTER, FILTERS, LIST_OPERATIONS, MAPS, WHOLES
from ebft.sandbox import Sandbox, Verdict
from pocket_folders import prompts_of_splits, rows, shared, smoke

SIZES = qa_coding.Sizes(pretrain=600, train=300, train_small=50, validation=20, test=20, test_depth=20, test_pairs=20)
EVERY = (*LIST_OPERATIONS, *AGGREGATES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smoke("qa_coding", tmp_path_factory.mktemp("qa") / "out")


@pytest.fixture(scope="module")
def task():
    return qa_coding.make(SIZES, 0)


def passes(source: str) -> bool:
    try:
        exec(source, {})
    except AssertionError:
        return False
    return True


def test_every_answer_passes_its_tests(task):
    for name in ("train", "validation", "test"):
        for row in task.files[name]:
            assert passes(row["prompt"] + row["completion"] + row["tests"]), row


def test_every_way_to_write_every_operation_does_what_it_says():
    rng = Random(0)
    lists = qa_coding.test_lists(12, rng)
    for operation in EVERY:
        assert len(set(operation.phrases)) == 3
        for style in STYLES:
            for code in operation.code or ("",):
                for results in (NAMINGS[naming] for naming in TASK.namings[style]):
                    program = ((operation, operation.values[-1]),)
                    source = "def f(xs):\n" + body(program, style, "x", results, [code])
                    space: dict = {}
                    exec(source, space)
                    assert [space["f"](list(xs)) for xs in lists] == [qa_coding.run(program, xs) for xs in lists]


def test_pretrain_answers_are_right_as_well():
    rng = Random(1)
    for _ in range(300):
        program = qa_coding.draw_program(rng.choice((1, 2, 3, 4)), rng)
        space: dict = {}
        exec("def f(xs):\n" + answer(program, PRETRAIN, rng)[1], space)
        for xs in qa_coding.test_lists(8, rng):
            wanted = qa_coding.run(program, xs)
            assert space["f"](list(xs)) == wanted, program


def test_answers_pass_and_others_fail_in_the_sandbox(folder):
    problems = load_problems(str(folder / "validation_problems.jsonl"))
    answers = {row["prompt"]: row["completion"] for row in rows(folder, "validation")}
    right = [problem.program(answers[problem.prompt]) for problem in problems]
    wrong = [problem.program("    return xs\n") for problem in problems]
    cut = problems[0].program(answers[problems[0].prompt] + "\nprint(")
    sandbox = Sandbox(allow_weak=True)
    passed = [outcome.verdict == Verdict.PASSED for outcome in sandbox.run_all([*right, *wrong, cut])]
    assert passed == [True] * len(right) + [False] * len(wrong) + [True]


def test_no_two_splits_share_a_prompt_or_program(task, folder):
    assert not shared(prompts_of_splits(folder))
    programs = {}
    for name, found in task.files.items():
        for row in found:
            if "operations" in row:
                split = name.removesuffix("_problems").removesuffix("_small")
                assert programs.setdefault(tuple(row["operations"]), split) == split
    assert {"train", "validation", "test", "test_depth", "test_pairs"} <= set(programs.values())


def test_held_out_pairs_and_depth_are_held_out(task):
    held_out = set(map(tuple, task.about["held_out_pairs"]))
    assert len(held_out) == SIZES.held_out_pairs
    for name, found in task.files.items():
        for row in found if name != "pretrain" else ():
            names = [operation.split()[0] for operation in row["operations"]]
            pairs = set(pairwise(names))
            assert bool(pairs & held_out) == (name == "test_pairs_problems"), row
            assert row["depth"] == len(names)
            assert (row["depth"] == 4) == (name == "test_depth_problems")


def test_no_phrase_means_two_operations():
    phrases = [phrase.format(k=2) for operation in EVERY for phrase in operation.phrases]
    assert len(set(phrases)) == len(phrases)


def test_pretrain_leaves_out_held_out_pairs_and_taken_programs():
    every_pair = {(a.name, b.name) for a in EVERY for b in EVERY}
    found, prompts = qa_coding.pretrain(SIZES, every_pair, set(), Random(0))
    assert len(found) == len(prompts) == SIZES.pretrain
    starts = [f"# {phrase[0].upper()}{phrase[1:]}" for operation in EVERY for phrase in operation.phrases]
    ends = ("", ", and return the list", "; return the result")
    single = {f"{start.format(k=k)}{end}.\ndef f(xs):\n" for start in starts for end in ends for k in range(10)}
    assert set(prompts) <= single
    taken = {((operation, k),) for operation in EVERY[1:] for k in operation.values}
    _, prompts = qa_coding.pretrain(SIZES, every_pair, taken, Random(0))
    assert len(set(prompts)) <= len(EVERY[0].phrases) * len(ends)


def test_validation_and_test_have_two_answers_of_each_prompt(task):
    for name in ("validation", "test"):
        answers = Counter(row["prompt"] for row in task.files[name])
        assert set(answers.values()) == {2}
        assert list(answers) == [row["prompt"] for row in task.files[f"{name}_problems"]]
        texts = {}
        for row in task.files[name]:
            texts.setdefault(row["prompt"], []).append(row["completion"])
        assert any(a != b for a, b in texts.values())
        assert len({row["id"] for row in task.files[name]}) == len(task.files[name])


def test_styles_have_the_shares_of_the_first_operation():
    rng = Random(0)
    program = ((FILTERS[0], 0), (MAPS[3], 0), (WHOLES[0], 0))
    counts = Counter(answer(program, TASK, rng)[0] for _ in range(4000))
    for style, share in TASK.styles[FILTER].items():
        assert counts[style] / 4000 == pytest.approx(share, abs=0.03)
    for habits in (TASK, PRETRAIN):
        for shares in (*habits.styles.values(), *habits.elements.values(), *habits.namings.values()):
            assert sum(shares.values()) == pytest.approx(1)


def test_stages_that_do_nothing_are_refused():
    lists = qa_coding.test_lists(10, Random(0))
    by_name = {operation.name: operation for operation in EVERY}
    steps = [(by_name[name], 0) for name in ("ascending", "descending", "sum")]
    assert qa_coding.every_stage_matters((steps[0],), lists)
    assert not qa_coding.every_stage_matters((steps[0], steps[1]), lists)
    assert not qa_coding.every_stage_matters((steps[0], steps[2]), lists)


def test_same_seed_same_files_and_another_seed_others(task):
    assert qa_coding.make(SIZES, 0).files == task.files
    other = qa_coding.make(SIZES, 1)
    assert other.files["test"] != task.files["test"]
    assert other.about["held_out_pairs"] != task.about["held_out_pairs"]


def test_programs_parse_and_end_where_the_function_ends(task):
    for row in task.files["train"]:
        (function,) = ast.parse(row["prompt"] + row["completion"]).body
        assert isinstance(function, ast.FunctionDef)
        assert not any(stop in row["completion"] for stop in row["stop"])


def test_task_json_counts_the_rows(folder):
    about = json.loads((folder / "task.json").read_text())
    assert about["rows"] == {file.name: len(file.read_text().splitlines()) for file in folder.glob("*.jsonl")}
    assert (
        about["task"] == "qa_coding" and about["seed"] == 0 and about["smoke"] and about["base_training_seconds"] > 0
    )
    assert rows(folder, "train_small") == rows(folder, "train")[: about["sizes"]["train_small"]]
