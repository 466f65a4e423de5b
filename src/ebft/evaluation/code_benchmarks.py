"""Code benchmarks in their published file formats: what a model is given, where its answer ends, what has to pass.

The format of a file is recognised by its fields:

- HumanEval (openai/openai_humaneval), and HumanEval+ as on the Hub (evalplus/humanevalplus): `prompt`, `entry_point`,
  `test`.
- MBPP (google-research-datasets/mbpp), full (`text`) and sanitised (`prompt`), and MBPP+ as on the Hub
  (evalplus/mbppplus: also `test`): `test_list`.
- HumanEval+ and MBPP+ as EvalPlus publishes them: `base_input`, `plus_input`, `canonical_solution`.
- MultiPL-E (nuprl/MultiPL-E): `tests`, `stop_tokens`, `language`.
- Ours, for any other problems: `prompt`, `tests`, and optionally `id`, `entry_point`, `stop`, `language`.
"""

import ast
import builtins
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .evalplus import evalplus_tests, with_numpy
from .rows import Row, given, one_of, read_rows, strings_of, text_of, value_of

if TYPE_CHECKING:
    from ebft.sandbox import Program

# Chen et al. 2021 ("Evaluating Large Language Models Trained on Code"), section 2.3. HumanEval+ takes the same, so
# that one set of completions is judged by both sets of tests.
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

# With a docstring for a prompt (`docstring_prompt`) the completion may define helpers: it ends where something but a
# definition follows. The list is that of bigcode-evaluation-harness (bigcode_eval/tasks/mbpp.py).
MBPP_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")

# Split of MBPP -> its task ids (Austin et al. 2021, "Program Synthesis with Large Language Models", and its README).
MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}

# Names of languages in files -> one name each; MultiPL-E names them by their files' suffixes.
LANGUAGES = {
    **{name: name for name in ("ada", "clojure", "cpp", "csharp", "d", "dart", "elixir", "fsharp", "go", "haskell")},
    **{name: name for name in ("java", "javascript", "julia", "lean", "lua", "matlab", "ocaml", "perl", "php")},
    **{name: name for name in ("python", "r", "racket", "ruby", "rust", "scala", "shell", "swift", "typescript")},
    **{"adb": "ada", "clj": "clojure", "cs": "csharp", "dlang": "d", "exs": "elixir", "fs": "fsharp", "m": "matlab"},
    **{"go_test.go": "go", "hs": "haskell", "js": "javascript", "jl": "julia", "ml": "ocaml", "pl": "perl"},
    **{
        "bash": "shell",
        "py": "python",
        "rb": "ruby",
        "rkt": "racket",
        "rs": "rust",
        "sh": "shell",
        "ts": "typescript",
    },
    **{"c++": "cpp", "c#": "csharp"},
}


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark.

    Attributes:
        id: Its name, unique in its benchmark.
        prompt: What the model is given, to the letter.
        tests: Trusted code that runs behind the candidate's, and raises (or exits with an error) if it is wrong.
        stop: Strings at which a completion is cut, the earliest one of all.
        language: One of the values of `LANGUAGES`.
        entry_point: Function that the tests call, where it is one.
        solution: The published solution, as a completion; for trying a sandbox.
    """

    id: str
    prompt: str
    tests: str
    stop: tuple[str, ...] = ()
    language: str = "python"
    entry_point: str | None = None
    solution: str | None = None

    def program(self, completion: str) -> "Program":
        """The program that tells whether a completion is right: prompt and cut completion, then the tests."""
        from ebft.sandbox import Program

        code = self.prompt + cut(completion, self.stop)
        return Program(code=code, tests=self.tests, language=self.language, entry_point=self.entry_point)


def cut(completion: str, stop: tuple[str, ...]) -> str:
    """A completion up to the first place where one of the strings begins; all of it if none is there."""
    places = [place for string in stop if (place := completion.find(string)) >= 0]
    return completion[: min(places)] if places else completion


def load_problems(
    name: str,
    *,
    split: str = "test",
    config: str | None = None,
    field: str = "code_benchmark",
    tell: Callable[[str], object] = lambda text: None,
) -> list[Problem]:
    """Read a benchmark; every row is checked before anything is generated.

    Args:
        name: A .jsonl, .json (either may end in .gz) or .parquet file, a folder, or a Hub name.
        split: Split of a folder or a Hub dataset. Of a file with all 974 problems of MBPP, or the sanitised ones, that
            split is chosen by task id ("all": every row); of another file, all rows are taken.
        config: Hub configuration, such as "humaneval-js" of nuprl/MultiPL-E.
        field: The option that `name` comes from, for messages.
        tell: Told how many problems of MBPP's file the split is.

    Raises:
        ValueError: There is no such file or dataset, it has no rows, no known format, or an unknown split of MBPP; or
            a row lacks a field, has one of another type, an unknown language, no tests, or another row's id. Names
            file and line (or dataset and row) and the field.
    """
    rows = read_rows(name, split, config, field)
    kind, read = _format_of(*rows[0])
    if kind == "mbpp":
        everything, rows = len(rows), _mbpp_split(rows, split, field)
        if len(rows) < everything:
            tell(f"{name}, {split} split: {len(rows)} of {everything} problems (all: --code_benchmark_split all)")
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for place, row in rows:
        problem = read(row, place)
        if problem.id in places:
            raise ValueError(f"{place}: the id {problem.id!r} is also that of {places[problem.id]}: rename one")
        places[problem.id] = place
        problems.append(problem)
    return problems


def docstring_prompt(text: str, test: str) -> str:
    """MBPP's prompt: a docstring of the task's text and its first test, as code to go on from.

    This is the prompt of InCoder (Fried et al. 2022), bigcode-evaluation-harness (bigcode_eval/tasks/mbpp.py) and
    EvalPlus, by which most base models' pass@k are published: without examples, and sampled like HumanEval. The
    paper's three examples between [BEGIN] and [DONE] are what lm-evaluation-harness does (`--tasks mbpp`); the numbers
    of the two are not comparable.
    """
    return f'"""\n{text.strip()}\n{test.strip()}\n"""\n'


def _format_of(place: str, row: Row) -> tuple[str, Callable[[Row, str], Problem]]:
    """Format of a file and its reader, from the field that only this format has."""
    for column, kind, read in (
        ("base_input", "evalplus", _evalplus),
        ("plus_input", "evalplus", _evalplus),
        ("stop_tokens", "multipl_e", _multipl_e),
        ("test_list", "mbpp", _mbpp),
        ("tests", "ours", own_problem),
        ("test", "humaneval", _humaneval),
        ("canonical_solution", "humaneval", _humaneval),
    ):
        if given(row, column):
            return kind, read
    raise ValueError(
        f"{place}: the fields {sorted(row)} are no known format: give each problem a `prompt` and `tests`, or pass "
        "HumanEval, MBPP, EvalPlus or MultiPL-E as published"
    )


def _humaneval(row: Row, place: str) -> Problem:
    entry_point = _function_name(row, place)
    return Problem(
        id=text_of(row, place, "task_id"),
        prompt=text_of(row, place, "prompt"),
        tests=with_numpy(f"{text_of(row, place, 'test')}\n\ncheck({entry_point})\n"),
        stop=HUMANEVAL_STOP,
        entry_point=entry_point,
        solution=value_of(row, place, "canonical_solution", str) if given(row, "canonical_solution") else None,
    )


def _evalplus(row: Row, place: str) -> Problem:
    identity, prompt, entry_point = text_of(row, place, "task_id"), text_of(row, place, "prompt"), None
    solution, entry_point = text_of(row, place, "canonical_solution"), _function_name(row, place)
    inputs = [*value_of(row, place, "base_input", list), *value_of(row, place, "plus_input", list)]
    if not inputs or not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError(f"{place}: `base_input` and `plus_input` must hold a list of arguments for each call")
    atol = float(value_of(row, place, "atol", (int, float)))
    is_mbpp = identity.startswith("Mbpp/")
    task = identity.rpartition("/")[2]
    if is_mbpp and not task.isdecimal():
        raise ValueError(f"{place}: the field `task_id` is {identity!r}: make it Mbpp/ and the task's number")
    reference = solution if is_mbpp else prompt + solution
    try:
        tests = evalplus_tests(reference, entry_point, inputs, atol, int(task) if is_mbpp else None)
    except (TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{place}: `base_input` or `plus_input` is not what MBPP+ task {task} takes ({error}): use the file as "
            "EvalPlus publishes it"
        ) from error
    if is_mbpp:
        prompt = prompt.strip() + "\n"  # a docstring already; EvalPlus strips it likewise
    stop = MBPP_STOP if is_mbpp else HUMANEVAL_STOP
    return Problem(identity, prompt, tests, stop, entry_point=entry_point, solution=solution)


def _mbpp(row: Row, place: str) -> Problem:
    """Full, sanitised, or MBPP+ as on the Hub, whose `test` is finished code with more inputs than `test_list`."""
    text = text_of(row, place, "prompt" if given(row, "prompt") and not given(row, "text") else "text")
    assertions = strings_of(row, place, "test_list")
    if not assertions or not all(assertion.strip() for assertion in assertions):
        raise ValueError(f"{place}: the field `test_list` is empty or holds a blank test: any answer would pass")
    lines = list(strings_of(row, place, "test_imports")) if given(row, "test_imports") else []
    lines += [value_of(row, place, "test_setup_code", str)] if given(row, "test_setup_code") else []
    lines += [text_of(row, place, "test")] if given(row, "test") else assertions
    code = "\n".join(line for line in lines if line.strip())
    return Problem(
        id=str(value_of(row, place, "task_id", (int, str))),
        prompt=docstring_prompt(text, assertions[0]),
        tests=with_numpy(f"{code}\n"),
        stop=MBPP_STOP,
        entry_point=_called(assertions),
        solution=value_of(row, place, "code", str) if given(row, "code") else None,
    )


def _mbpp_split(rows: list[tuple[str, Row]], split: str, field: str) -> list[tuple[str, Row]]:
    """Rows of a split of MBPP, if the rows are of several; MBPP+ has none, and is made of all of them."""
    ids = [value_of(row, place, "task_id", (int, str)) for place, row in rows]
    found = {name for name, members in MBPP_SPLITS.items() if any(identity in members for identity in ids)}
    if split == "all" or len(found) < 2 or any(given(row, "test") for _, row in rows):
        return rows
    if split not in found:
        raise ValueError(f"{field}: MBPP has no split {split!r} here: choose one of {', '.join(sorted(found))}, all")
    return [row for row, identity in zip(rows, ids, strict=True) if identity in MBPP_SPLITS[split]]


def _multipl_e(row: Row, place: str) -> Problem:
    return Problem(
        id=text_of(row, place, "name"),
        prompt=text_of(row, place, "prompt"),
        tests=text_of(row, place, "tests"),
        stop=_stop(row, place, "stop_tokens"),
        language=one_of(text_of(row, place, "language"), LANGUAGES, place, "language"),
    )


def own_problem(row: Row, place: str) -> Problem:
    """A problem of `prompt` and `tests`, and optionally `id`, `entry_point`, `stop` and `language`.

    Raises:
        ValueError: A field is missing or of another type, or the tests are no Python; names the place and the field.
    """
    language = text_of(row, place, "language") if given(row, "language") else "python"
    entry_point = text_of(row, place, "entry_point") if given(row, "entry_point") else None
    tests = text_of(row, place, "tests")
    if language == "python":
        _check_python(tests, place)
    return Problem(
        # Without an id, a problem is known by its line or row.
        id=str(value_of(row, place, "id", (str, int))) if given(row, "id") else place.rpartition(", ")[2],
        prompt=text_of(row, place, "prompt"),
        tests=tests,
        stop=_stop(row, place, "stop") if given(row, "stop") else (),
        language=one_of(language, LANGUAGES, place, "language"),
        entry_point=entry_point,
    )


def _check_python(tests: str, place: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes, say
            ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{place}: the field `tests` is no Python ({error}), so every completion would fail: mend it, or name its "
            "`language`"
        ) from error


def _stop(row: Row, place: str, column: str) -> tuple[str, ...]:
    stop = strings_of(row, place, column)
    if "" in stop:
        raise ValueError(f"{place}: the field `{column}` holds an empty string, which would cut all: remove it")
    return stop


def _function_name(row: Row, place: str) -> str:
    name = text_of(row, place, "entry_point")
    if not name.isidentifier():
        raise ValueError(
            f"{place}: the field `entry_point` is {name!r}, the name of no function: convert the row to `prompt` and "
            "`tests`, with tests that make the call themselves"
        )
    return name


def _called(assertions: tuple[str, ...]) -> str | None:
    """The one function that assertions call and Python does not bring along, if it is only one."""
    try:
        trees = [ast.parse(assertion) for assertion in assertions]
    except SyntaxError:
        return None
    calls = (node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = {function.id for function in calls if isinstance(function, ast.Name)} - set(dir(builtins))
    return names.pop() if len(names) == 1 else None


def check_languages(problems: list[Problem], field: str = "code_benchmark") -> None:
    """Refuse problems that this machine cannot run, before anything is generated.

    Raises:
        ValueError: The sandbox knows no interpreter of a problem's language here.
    """
    from ebft.sandbox import available_languages

    known = available_languages()
    for problem in problems:
        if problem.language not in known:
            raise ValueError(
                f"{field}: the problem {problem.id!r} is in {problem.language}, which cannot be run here (there is "
                f"{', '.join(sorted(known))}): install its interpreter if the sandbox knows it, or leave it out"
            )
