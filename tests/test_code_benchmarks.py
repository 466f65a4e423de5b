"""Code benchmarks: each published format, the program it becomes, and what is said of a broken file.

The problems here are our own, in the published formats.
"""

import dataclasses
import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebft.evaluation.code_benchmarks import (
    HUMANEVAL_STOP,
    MBPP_STOP,
    check_languages,
    cut,
    docstring_prompt,
    load_problems,
)
from ebft.evaluation.evalplus import agree, close, restored, source_of
from ebft.sandbox import Sandbox, Verdict, available_languages

HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'def halve(numbers):\n    """Half of each number."""\n',
    "entry_point": "halve",
    "canonical_solution": "    return [number / 2 for number in numbers]\n",
    "test": "def check(candidate):\n    assert candidate([1, 4]) == [0.5, 2.0]\n    assert candidate([]) == []\n",
}
# As on the Hub: finished tests, which import numpy.
HUMANEVAL_PLUS_HUB = HUMANEVAL | {
    "test": "import numpy as np\n\ndef check(candidate):\n"
    "    for given, wanted in zip([[[1, 4]]], [[0.5, 2.0 + 1e-9]]):\n"
    "        assert not isinstance(wanted, np.ndarray)\n"
    "        np.testing.assert_allclose(candidate(*given), wanted, atol=1e-6)\n"
}
EVALPLUS = {name: HUMANEVAL[name] for name in ("task_id", "prompt", "entry_point", "canonical_solution")} | {
    "contract": "\n    assert isinstance(numbers, list) # $_CONTRACT_$\n",
    "base_input": [[[1, 4]]],
    "plus_input": [[[]], [[1e300, float("inf")]]],
    "atol": 0,
}
MBPP = {
    "text": "Write a function to count the given word.",
    "code": "def count(words, word):\r\n  return words.count(word)",
    "task_id": 11,
    "test_setup_code": "",
    "test_list": ["assert count(['a', 'b', 'a'], 'a') == 2", "assert count([], 'a') == 0"],
    "challenge_test_list": [],
}
SANITISED = {
    "source_file": "Ours.ipynb",
    "task_id": 12,
    "prompt": "Write a function to take the root of a number.",
    "code": "def root(x):\n    return x ** 0.5",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(root(9), 3)"],
}
MBPP_PLUS_HUB = SANITISED | {
    "test_list": ["assert root(9) == 3"],
    "test": "import numpy as np\nfor given, wanted in [([9], 3), ([2], 1.41421356)]:\n"
    "    assert np.allclose(root(*given), wanted, rtol=1e-07, atol=1e-6)\n",
}
MBPP_PLUS = {
    "task_id": "Mbpp/2",
    "prompt": '\n"""\nWrite a function for what two tuples share.\nassert similar_elements((1,), (1,)) == (1,)\n"""\n',
    "contract": "",
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))",
    "base_input": [[[1, 2], [2, 3]]],
    "plus_input": [[[3, 2, 1], [1, 2, 3]]],
    "atol": 0,
}
MULTIPL_E = {
    "name": "HumanEval_900_halve",
    "language": "js",
    "prompt": "//Half of a number\nfunction halve(x){\n",
    "doctests": "transform",
    "original": "HumanEval_900_halve.py",
    "prompt_terminology": "reworded",
    "tests": "const assert = require('node:assert');\n\nfunction test() {\n  let candidate = halve;\n"
    "  assert.deepEqual(candidate(3),1.5);\n}\n\ntest();",
    "stop_tokens": ["\nfunction ", "\n/*", "\n//", "\nconsole.log"],
}
OURS = {"prompt": "def one():\n", "tests": "assert one() == 1\n"}

# Format -> a row, a right completion, a wrong one. Behind a stop string there is nothing that would run.
FORMATS = {
    "humaneval": (HUMANEVAL, HUMANEVAL["canonical_solution"] + "\ndef ", "    return None\n"),
    "humaneval_plus_hub": (HUMANEVAL_PLUS_HUB, HUMANEVAL["canonical_solution"], "    return [0.5, 2.00001]\n"),
    "evalplus": (EVALPLUS, "    return [x * 0.5 for x in numbers]\nprint(", "    return [0.5, 2.0]\n"),
    "mbpp": (MBPP, MBPP["code"] + "\nassert (", "def count(words, word):\n    return 2\n"),
    "sanitised": (SANITISED, SANITISED["code"] + '\n"""', "def root(x):\n    return x / 4\n"),
    "mbpp_plus_hub": (MBPP_PLUS_HUB, SANITISED["code"], "def root(x):\n    return x / 3\n"),
    "mbpp_plus": (
        MBPP_PLUS,
        "def similar_elements(a, b):\n    return [x for x in a if x in b] * isinstance(a, tuple)\n",
        "def similar_elements(a, b):\n    return (2,)\n",
    ),
    "multipl_e": (MULTIPL_E, "  return x / 2;\n}\n\nfunction (", "  return 1;\n}\n"),
    "ours": (OURS | {"entry_point": "one", "stop": ["<end>"], "id": 7}, "    return 1\n<end>(", "    return 2\n"),
}


def write(path, rows):
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    if ".jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


def load(tmp_path, *rows, name="rows.jsonl", **options):
    return load_problems(write(tmp_path / name, rows), **options)


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(allow_weak=True)  # these programs are our own
    except RuntimeError as error:
        pytest.skip(str(error))


# --- what a row becomes ---


@pytest.mark.parametrize("name", FORMATS)
def test_right_completions_pass_and_wrong_ones_do_not(tmp_path, sandbox, name):
    row, right, wrong = FORMATS[name]
    (problem,) = load(tmp_path, row)
    if problem.language not in available_languages():
        pytest.skip(f"no interpreter for {problem.language} here")
    programs = [problem.program(completion) for completion in (right, wrong)]
    if problem.solution is not None:
        programs.append(problem.program(problem.solution))
    outcomes = sandbox.run_all(programs)
    expected = [Verdict.PASSED, Verdict.FAILED, Verdict.PASSED][: len(programs)]
    assert [outcome.verdict for outcome in outcomes] == expected, outcomes


def test_humaneval(tmp_path):
    (problem,) = load(tmp_path, HUMANEVAL)
    assert (problem.id, problem.prompt) == (HUMANEVAL["task_id"], HUMANEVAL["prompt"])
    assert (problem.stop, problem.language, problem.entry_point) == (HUMANEVAL_STOP, "python", "halve")
    program = problem.program("    return 0\n\ndef other():\n    pass\n")
    assert program.code == HUMANEVAL["prompt"] + "    return 0\n"
    assert program.tests.startswith(HUMANEVAL["test"]) and program.tests.endswith("check(halve)\n")
    assert (program.language, program.entry_point) == ("python", "halve")


def test_mbpp_prompt_is_a_docstring_with_one_test(tmp_path):
    (problem,) = load(tmp_path, MBPP)
    assert problem.prompt == f'"""\n{MBPP["text"]}\n{MBPP["test_list"][0]}\n"""\n'
    assert (problem.id, problem.stop, problem.entry_point) == ("11", MBPP_STOP, "count")
    assert problem.program(MBPP["code"]).tests.splitlines() == MBPP["test_list"]
    (plus,) = load(tmp_path, MBPP_PLUS)
    assert plus.prompt == MBPP_PLUS["prompt"].lstrip("\n")  # it is one already
    (sanitised,) = load(tmp_path, SANITISED)
    assert sanitised.prompt == docstring_prompt(SANITISED["prompt"], SANITISED["test_list"][0])
    assert sanitised.tests.startswith("import math\n")


def test_mbpp_helpers_are_no_entry_point(tmp_path):
    """Tests that call more than one function of the candidate's, or none, say nothing about which one it is."""
    both = MBPP | {"test_list": ["assert first(Pair(1, 2)) == 1"]}
    shadowed = MBPP | {"task_id": 13, "test_list": ["assert sum(1, 2) == 3"]}
    wrapped = MBPP | {"task_id": 14, "test_list": ["assert set(shared([1], [1])) == set([1])"]}
    assert [p.entry_point for p in load(tmp_path, both, shadowed, wrapped)] == [None, None, "shared"]


def test_mbpp_split_is_chosen_by_task_id(tmp_path):
    rows = [MBPP | {"task_id": i} for i in (1, 10, 11, 510, 511, 600, 601, 974)]

    def ids(**options):
        return [int(problem.id) for problem in load(tmp_path, *rows, **options)]

    told: list[str] = []
    assert ids(tell=told.append) == [11, 510] and "test split: 2 of 8 problems" in told[0]
    assert (
        ids(split="train") == [601, 974] and ids(split="validation") == [511, 600] and ids(split="prompt") == [1, 10]
    )
    assert ids(split="all") == [1, 10, 11, 510, 511, 600, 601, 974]
    with pytest.raises(ValueError, match=r"MBPP has no split 'dev' here: choose one of prompt, test, train, valid"):
        ids(split="dev")
    # A file of one split only is what was asked for, and MBPP+ has no splits.
    assert len(load(tmp_path, *rows[-2:])) == 2
    assert len(load(tmp_path, MBPP_PLUS_HUB, MBPP_PLUS_HUB | {"task_id": 700})) == 2


def test_multipl_e(tmp_path):
    problems = load(tmp_path, MULTIPL_E, MULTIPL_E | {"name": "b", "language": "go_test.go"})
    assert [problem.language for problem in problems] == ["javascript", "go"]
    assert problems[0].stop == tuple(MULTIPL_E["stop_tokens"])
    assert problems[0].program("  return 1;\n}\nconsole.log(1)").code == MULTIPL_E["prompt"] + "  return 1;\n}"
    assert problems[0].entry_point is None


def test_ours_needs_prompt_and_tests_only(tmp_path):
    first, second = load(tmp_path, OURS, OURS)
    assert (first.id, second.id) == ("line 1", "line 2")
    assert (first.stop, first.language, first.entry_point) == ((), "python", None)
    assert first.program("    return 1\n") == dataclasses.replace(first.program(""), code="def one():\n    return 1\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_files(tmp_path, name):
    rows = [HUMANEVAL, HUMANEVAL | {"task_id": "HumanEval/901"}]
    assert load(tmp_path, *rows, name=name) == load(tmp_path, *rows)


def test_a_folder_is_read_as_a_dataset_of_the_hub_is(tmp_path):
    """Through `datasets`, which fills fields that a row lacks with nulls."""
    write(tmp_path / "test.jsonl", [OURS | {"id": "a"}, OURS | {"id": "b", "stop": ["#"]}])
    problems = load_problems(str(tmp_path))
    assert [(problem.id, problem.stop) for problem in problems] == [("a", ()), ("b", ("#",))]


def test_cut():
    assert cut("a\ndef b\nclass c", ("\nclass", "\ndef")) == "a"
    assert cut("a\ndef b", ("\nclass",)) == "a\ndef b"
    assert cut("a", ()) == "a"
    # The line break in front of a stop string is the completion's own, not the prompt's last.
    assert cut("def b", ("\ndef",)) == "def b"


# --- EvalPlus ---


def test_inputs_get_their_types_back():
    assert restored(2, [[1], [2]]) == [(1,), (2,)]
    assert restored(63, [[[1, 2]]]) == [[(1, 2)]]
    assert restored(75, [[[1, 2]], 3]) == [[(1, 2)], 3]
    assert restored(750, [[1], [2]]) == [[1], (2,)]
    assert restored(307, [[1, []], 2, 3]) == [(1, []), 2, 3]
    assert restored(259, [[[1, 2], [3]]]) == [((1, 2), (3,))]
    assert restored(580, [[1, [2, [3]]]]) == [(1, (2, (3,)))]
    assert restored(278, [[1, [2]]]) == [(1, (2,))]
    assert restored(722, [{"a": [1, 2]}, 3]) == [{"a": (1, 2)}, 3]
    assert restored(115, [[[1, 1], []]]) == [[{1}, {}]]
    assert restored(124, ["0", "1j"]) == [0.0, 1j] and restored(252, ["1+1j"]) == [1 + 1j]
    assert restored(3, [[1], 2]) == [[1], 2] and restored(3, []) == []


def test_source_of_values_json_cannot_hold():
    value = [(1,), (), {"a": {2}, "b": [None, True, 1j]}, "it's", -math.inf, 0.1]
    assert eval(source_of(value)) == value
    assert math.isnan(eval(source_of(math.nan)))


def test_results_are_compared_as_evalplus_does():
    assert agree("f", [], [0.1 + 0.2], [0.3], 0, False)  # floats: within 1e-6
    assert not agree("f", [], (0.1 + 0.2,), [0.3], 0, False)  # of another type
    assert not agree("f", [], 1, 2, 0, False) and not agree("f", [], 1.0, 1.1, 0, False)
    assert agree("f", [], 1.0, 1.1, 0.2, False) and not agree("f", [], "a", "b", 0.2, False)
    assert agree("find_zero", [[-6, 11, -6, 1]], 2.0, 1.0, 1e-4, False)  # any root
    assert not agree("find_zero", [[-6, 11, -6, 1]], 2.1, 2.0, 1e-4, False)
    assert agree("similar_elements", [], [2, 1], (1, 2), 0, True) and not agree("other", [], [2, 1], [1, 2], 0, True)
    assert agree("check_str", [], True, object(), 0, True) and not agree("check_str", [], None, object(), 0, True)
    assert agree("digit_distance_nums", [123, 7], 7, 8, 0, True) and agree("sum_div", [], 0, 5, 0, True)
    assert agree("surface_Area", [3, 4], 35, 33, 0, True) and not agree("surface_Area", [3, 4], 34, 33, 0, True)
    assert close([[1, 2.0]], [(1, 2)], 0) and not close([1, 2], [1], 1) and not close(1.0, math.inf, 1)
    assert close(math.inf, math.inf, 0) and not close(math.nan, math.nan, 1) and not close("a", 1, 1)


# --- bad input ---


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HUMANEVAL, without(HUMANEVAL, "entry_point")], r"line 2: the field `entry_point` is missing \(there are \["),
        ([HUMANEVAL, HUMANEVAL | {"prompt": None}], r"line 2: the field `prompt` is null: make it a string"),
        ([HUMANEVAL | {"test": 3}], r"line 1: the field `test` is int: make it a string"),
        ([HUMANEVAL | {"test": " \n"}], r"line 1: the field `test` is blank"),
        ([without(HUMANEVAL, "test")], r"line 1: the field `test` is missing"),
        (
            [HUMANEVAL | {"entry_point": "Solution().f"}],
            r"line 1: the field `entry_point` is 'Solution\(\).f', the name",
        ),
        ([HUMANEVAL, HUMANEVAL], r"rows.jsonl, line 2: the id 'HumanEval/900' is also that of .*rows.jsonl, line 1"),
        ([MBPP, without(MBPP, "text")], r"line 2: the field `text` is missing"),
        ([MBPP | {"task_id": True}], r"line 1: the field `task_id` is bool: make it a whole number or a string"),
        ([MBPP | {"test_list": []}], r"line 1: the field `test_list` is empty .* any answer would pass"),
        ([MBPP | {"test_list": ["", "assert 1"]}], r"line 1: the field `test_list` is empty or holds a blank test"),
        ([MBPP | {"test_list": "assert 1"}], r"line 1: the field `test_list` is str: make it a list"),
        ([MBPP | {"test_list": ["assert 1", 2]}], r"line 1: element 1 of the field `test_list` is int"),
        ([EVALPLUS | {"base_input": [], "plus_input": []}], r"line 1: `base_input` and `plus_input` must hold a list"),
        ([EVALPLUS | {"plus_input": [3]}], r"line 1: `base_input` and `plus_input` must hold a list"),
        ([EVALPLUS, without(EVALPLUS, "plus_input")], r"line 2: the field `plus_input` is missing"),
        ([EVALPLUS | {"atol": "0"}], r"line 1: the field `atol` is str: make it a whole number or a number"),
        ([MBPP_PLUS | {"base_input": [[3, 4]]}], r"line 1: `base_input` or .* not what MBPP\+ task 2 takes \('int'"),
        ([MBPP_PLUS | {"task_id": "Mbpp/two"}], r"line 1: the field `task_id` is 'Mbpp/two'"),
        ([MULTIPL_E | {"language": "cobol"}], r"line 1: the field `language` is 'cobol', not one of ada, adb, "),
        ([MULTIPL_E | {"stop_tokens": ["a", ""]}], r"line 1: the field `stop_tokens` holds an empty string"),
        ([OURS | {"language": "cobol"}], r"line 1: the field `language` is 'cobol'"),
        ([OURS, without(OURS, "tests")], r"line 2: the field `tests` is missing"),
        ([OURS, OURS | {"id": "b", "tests": "assert f( == 1"}], r"line 2: the field `tests` is no Python \("),
        ([OURS, {"prompt": "a"}, 3], r"line 3: int where an object is expected"),
        ([OURS | {"id": "a"}, OURS | {"id": "a"}], r"line 2: the id 'a' is also that of"),
        (
            [{"text": "a"}],
            r"line 1: the fields \['text'\] are no known format: give each problem a `prompt` and `tests`",
        ),
        ([], r"code_benchmark='.*rows.jsonl' holds no rows"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *rows)


def test_bad_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(OURS) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, column 2: invalid JSON"):
        load_problems(str(path))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no whole Parquet file"):
        load_problems(str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"^problems='.*a\.txt' is no \.jsonl, \.json"):
        load_problems(str(tmp_path / "a.txt"), field="problems")
    with pytest.raises(ValueError, match=r"^code_benchmark='nosuch\.jsonl': no such file"):
        load_problems("nosuch.jsonl")


def test_rows_of_other_files_are_named_by_their_number(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: the field `prompt` is null"):
        load(tmp_path, OURS, OURS | {"prompt": None}, name="a.parquet")
    with pytest.raises(ValueError, match=r"a\.json, row 1: the field `tests` is missing"):
        load(tmp_path, OURS, {"prompt": "a"}, name="a.json")


def test_languages_are_checked_before_anything_is_generated(tmp_path):
    check_languages(load(tmp_path, OURS))
    with pytest.raises(ValueError, match=r"^code_benchmark: the problem 'b' is in go, which cannot be run here"):
        check_languages(load(tmp_path, MULTIPL_E | {"name": "b", "language": "go_test.go"}))
