"""The standard library as a task: split by file, functions whole, and only syntax is judged."""

import ast
import json

import pytest

from ebft.evaluation.code_benchmarks import cut, load_problems
from ebft.pocket import stdlib_code
from ebft.sandbox import Sandbox, Verdict
from ebft.scratch.corpus import read, source_files
from pocket_folders import prompts_of_splits, rows, shared, smoke

SOURCE = '''
class A:
    @staticmethod
    def kept(a, b=1, *, c=None):
        """Say it."""

        if a:
            return b
        return c

    def computed_default(a=DEFAULT):
        """Say it."""
        return a

    def annotated(a: int):
        """Say it."""
        return a

    def silent(a):
        return a

    def empty(a):
        """Only this."""
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smoke("stdlib_code", tmp_path_factory.mktemp("stdlib") / "out")


def test_functions_are_moved_to_module_level():
    found = list(stdlib_code.functions(SOURCE, 500, 500))
    prompt = 'def kept(a, b=1, *, c=None):\n    """Say it."""\n'
    assert found == [(prompt, "    if a:\n        return b\n    return c\n")]
    assert not list(stdlib_code.functions(SOURCE, len(prompt) - 1, 500))
    assert not list(stdlib_code.functions(SOURCE, 500, 10))
    assert not list(stdlib_code.functions("def f(:", 500, 500))


def test_pieces_are_lines_of_the_file_in_bounds():
    text = "".join(f"line {i}\n" + ("\n" if i % 7 == 6 else "") for i in range(200)) + "x" * 400 + "\nend\n"
    found = list(stdlib_code.pieces(text, 200))
    assert all(50 <= len(piece) <= 200 and piece in text for piece in found)
    assert len("".join(found)) > 0.9 * (len(text) - 400)
    assert found == sorted(found, key=text.index)


def test_files_are_split_without_overlap_and_by_seed():
    files = source_files()
    parts = stdlib_code.split_files(files, stdlib_code.Sizes(), 0)
    assert sorted(file for part in parts.values() for file in part) == sorted(files)
    assert parts == stdlib_code.split_files(files, stdlib_code.Sizes(), 0)
    assert parts != stdlib_code.split_files(files, stdlib_code.Sizes(), 1)
    assert min(map(len, parts.values())) > 20


def test_no_two_splits_share_a_text(folder):
    prompts = prompts_of_splits(folder)
    assert not shared(prompts)
    files = stdlib_code.split_files(source_files(), stdlib_code.SMOKE, 0)
    for name in ("pretrain", "train", "validation", "test"):
        text = "\n".join(read(file) for file in files[name])
        assert all(row["text"] in text for row in rows(folder, name))


def test_functions_compile_and_are_in_no_training_file(folder):
    files = stdlib_code.split_files(source_files(), stdlib_code.SMOKE, 0)
    known = "\n".join(stdlib_code.normalised(read(file)) for name in ("train", "pretrain") for file in files[name])
    for name in ("validation", "test"):
        for row in rows(folder, f"{name}_functions"):
            (function,) = ast.parse(row["prompt"] + row["completion"]).body
            assert ast.get_docstring(function)
            assert stdlib_code.normalised(row["completion"]) not in known
            assert cut(row["completion"], tuple(stdlib_code.STOP)) == row["completion"]


def test_problems_pass_where_the_program_compiles_and_nowhere_else(folder):
    problems = load_problems(str(folder / "test_problems.jsonl"))
    answers = [row["completion"] for row in rows(folder, "test_functions")]
    right = [problem.program(answer + "x = (") for problem, answer in zip(problems, answers, strict=True)]
    wrong = [problem.program("    return (\n") for problem in problems]
    passed = [outcome.verdict == Verdict.PASSED for outcome in Sandbox(allow_weak=True).run_all([*right, *wrong])]
    assert passed == [True] * len(right) + [False] * len(wrong)


def test_task_says_that_nothing_verifies_it(folder):
    assert "RLVR does not apply" in json.loads((folder / "task.json").read_text())["verifiable"]


def test_too_small_a_library_is_told(monkeypatch):
    monkeypatch.setattr(stdlib_code, "source_files", lambda: source_files()[:120])
    with pytest.raises(ValueError, match=r"test=300, but this Python's standard library yields only|=\d+, but"):
        stdlib_code.make(stdlib_code.Sizes(), 0)
