"""Verifiable rewards for RLVR, as TRL's reward functions: unit tests in the sandbox, BLEU, or one of your own."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from ..evaluation.code_benchmarks import Problem, own_problem
from ..evaluation.translation import STOP
from ..evaluation.translation_scores import sentence_bleu
from ..extras import require
from ..sandbox import Limits, Sandbox, Verdict

Reward = Callable[..., list[float | None]]
Row = dict[str, Any]
CODE_COLUMNS = ("id", "tests", "entry_point", "stop", "language")


def make_reward(name: str, *, time_limit: float = 10.0, allow_weak_sandbox: bool = False) -> Reward:
    """The reward function that a name stands for.

    Args:
        name: `unit_tests`, `bleu`, or an import path such as `my_rewards.length`, of the current folder too.
        time_limit: Seconds that one program may run.
        allow_weak_sandbox: Run code even where only resource limits protect.

    Raises:
        ValueError: There is no such function, or sacrebleu is not installed.
        RuntimeError: There is no sandbox.
    """
    if name == "unit_tests":
        limits = Limits(wall_seconds=time_limit, cpu_seconds=time_limit)
        return UnitTests(Sandbox(limits, allow_weak=allow_weak_sandbox))
    if name == "bleu":
        require("sacrebleu", "translation", "reward: bleu")
        return bleu
    return imported(name)


class UnitTests:
    """1 for a completion that passes its row's tests, behind its prompt, and 0 for any other.

    Args:
        sandbox: Runs the programs.
    """

    __name__ = "unit_tests"  # what TRL calls the reward in its metrics

    def __init__(self, sandbox: Sandbox):
        self.sandbox = sandbox

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Rewards of completions, in their order."""
        problems = self._problems(prompts, columns)
        programs = [problem.program(text) for problem, text in zip(problems, completions, strict=True)]
        different = list(dict.fromkeys(programs))  # a sharp policy writes many alike
        outcomes = dict(zip(different, self.sandbox.run_all(different), strict=True))
        refused = next((outcome for outcome in outcomes.values() if outcome.verdict is Verdict.REFUSED), None)
        if refused is not None:
            # A reward of 0 would blame the model.
            raise RuntimeError(f"the sandbox refused to run a completion: {refused.detail}")
        return [float(outcomes[program].verdict is Verdict.PASSED) for program in programs]

    def _problems(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Problem]:
        given = {name: columns[name] for name in CODE_COLUMNS if name in columns}
        rows = [{"prompt": p, **{name: values[i] for name, values in given.items()}} for i, p in enumerate(prompts)]
        return [own_problem(row, f"prompt {row['prompt']!r:.60}") for row in rows]

    def check(self, rows: Iterable[Row], label: str) -> None:
        """Read every row's tests before any training.

        Raises:
            ValueError: Names the row and the field.
        """
        for index, row in enumerate(rows):
            own_problem(row, f"{label}, row {index}")


def bleu(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Sentence BLEU from 0 to 1 of each completion's first line, against `references`, or the row's completion."""
    references = columns.get("references") or [[text] for text in columns["reference"]]
    directions = columns.get("direction") or [None] * len(completions)
    return [
        sentence_bleu(first_line(text), [reference.strip() for reference in of_row], direction) / 100
        for text, of_row, direction in zip(completions, references, directions, strict=True)
    ]


def first_line(text: str) -> str:
    """A translation as it is cut in evaluation."""
    return text.split(STOP[0], 1)[0].strip()


def imported(path: str) -> Reward:
    """A function by its import path.

    Raises:
        ValueError: There is none.
    """
    module, _, name = path.rpartition(".")
    if not module:
        known = "unit_tests, bleu, or an import path such as my_rewards.length"
        raise ValueError(f"reward={path!r} is unknown: use {known}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's own file is; the `ebft` script does not look there
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward={path!r} cannot be imported ({error}): give module.function.") from error
    if not callable(function):
        raise ValueError(f"reward={path!r} is no function: it must take prompts, completions and columns.")
    return cast(Reward, function)
