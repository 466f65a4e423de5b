"""Tasks with an answer to check: code against its tests in the sandbox, translations against their references."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .code_benchmarks import Problem
from .generation import GenerationSettings, complete
from .pass_at_k import pass_at_k
from .records import Record, RecordFile
from .translation import STOP

if TYPE_CHECKING:
    from ..sandbox import Sandbox

Progress = Callable[[int], None]


def prompt_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Prompts as training tokenises them: each by itself, with the tokenizer's own special tokens."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def run_code(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    sandbox: "Sandbox",
    settings: GenerationSettings,
    file: RecordFile,
    advance: Progress,
) -> None:
    """Sample completions and run them; a record per problem: `samples`, `verdicts`, `details`.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        problems: Of a benchmark.
        sandbox: Runs the programs.
        settings: Of the completions.
        file: Where the records go; problems it holds are not run again.
        advance: Told how many problems are done.
    """
    prompts = prompt_tokens(tokenizer, [problem.prompt for problem in problems])
    done = [problem.id in file for problem in problems]
    advance(sum(done))
    for found in complete(model, tokenizer, prompts, settings, [problem.stop for problem in problems], done):
        new = {i: samples for i, samples in found.items() if not done[i]}
        outcomes = iter(sandbox.run_all(problems[i].program(text) for i, samples in new.items() for text in samples))
        records: list[Record] = []
        for i, samples in new.items():
            of_problem = [next(outcomes) for _ in samples]
            verdicts = [outcome.verdict.value for outcome in of_problem]
            details = [outcome.detail for outcome in of_problem]
            records.append({"id": problems[i].id, "samples": samples, "verdicts": verdicts, "details": details})
        file.append(records)
        advance(len(records))


def pass_records(records: Sequence[Record], ks: Sequence[int], name: str) -> list[Record]:
    """pass@k of each problem, as records of sums and counts; `name` goes in front of "pass@k"."""
    out = []
    for record in records:
        n, c = len(record["verdicts"]), record["verdicts"].count("passed")
        out.append({"id": record["id"], **{f"{name}/pass@{k}": [float(pass_at_k(n, c, k)), 1.0] for k in ks}})
    return out


def run_translation(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: GenerationSettings,
    file: RecordFile,
    advance: Progress,
) -> None:
    """Translate; a record per prompt, `id` its number: `hypotheses`."""
    tokens, done = prompt_tokens(tokenizer, prompts), [i in file for i in range(len(prompts))]
    advance(sum(done))
    for found in complete(model, tokenizer, tokens, settings, [STOP] * len(prompts), done):
        records = [
            {"id": i, "hypotheses": [text.strip() for text in texts]} for i, texts in found.items() if not done[i]
        ]
        file.append(records)
        advance(len(records))
