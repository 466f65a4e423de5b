"""Code against its tests in the sandbox: pass@k, greedy and sampled."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ..code_benchmarks import Problem, check_languages, load_problems
from ..config import short_names
from ..intervals import DocumentMean
from ..pass_at_k import pass_at_k
from ..records import Record, RecordFile
from ..settings import GenerationSettings
from ..summary import means_of
from .base import Session, Suite, Turn, generation_identity, prompt_tokens

if TYPE_CHECKING:
    from ...sandbox import Sandbox


class CodeSuite(Suite):
    """All code benchmarks of an evaluation.

    Raises:
        ValueError: A file, a problem or its language cannot be used, or there is no sandbox.
    """

    def __init__(self, session: Session):
        from ...sandbox import Limits, Sandbox

        self.config = config = session.config
        options: dict[str, Any] = {"split": config.code_benchmark_split, "config": config.code_benchmark_config}
        options["tell"] = partial(session.console.print, highlight=False, markup=False)
        self.benchmarks = {
            short: load_problems(name, **options)
            for short, name in zip(short_names(config.code_benchmark), config.code_benchmark, strict=True)
        }
        for problems in self.benchmarks.values():
            check_languages(problems)
            session.check_room([problem.id for problem in problems], [problem.prompt for problem in problems])
        limits = Limits(wall_seconds=config.time_limit, cpu_seconds=config.time_limit)
        self.sandbox = Sandbox(limits, allow_weak=config.allow_weak_sandbox)
        session.console.print(f"Generated code runs in: {self.sandbox.layer}", highlight=False)

    def measure(self, turn: Turn) -> dict[str, DocumentMean]:
        """pass@k of each benchmark; a unit is a problem."""
        means = {}
        for name, problems in self.benchmarks.items():
            for kind, (settings, ks) in self._runs().items():
                file = self._file(turn, name, kind, settings)
                with turn.progress(f"{name}, {kind}", len(problems)) as advance:
                    run_code(turn, problems, self.sandbox, settings, file, advance)
                means |= means_of(pass_records(list(file.records.values()), ks, f"{name}/{kind}"))
        return means

    def open_records(self, turn: Turn) -> None:
        """Those of each benchmark."""
        for name in self.benchmarks:
            for kind, (settings, _) in self._runs().items():
                self._file(turn, name, kind, settings)

    def _runs(self) -> dict[str, tuple[GenerationSettings, Sequence[int]]]:
        """How problems are completed, and the k of pass@k."""
        config = self.config
        runs: dict[str, tuple[GenerationSettings, Sequence[int]]] = {"greedy": (config.greedy(), [1])}
        if config.num_samples > 1:
            runs["sampled"] = config.sampled(config.num_samples), config.pass_at_k
        return runs

    def _file(self, turn: Turn, name: str, kind: str, settings: GenerationSettings) -> RecordFile:
        about = {"time_limit": self.config.time_limit, "sandbox": self.sandbox.layer}
        about |= generation_identity(settings, self.config.generation_engine)
        return turn.records(f"code-{name}-{kind}", about, [asdict(problem) for problem in self.benchmarks[name]])


def run_code(
    turn: Turn,
    problems: Sequence[Problem],
    sandbox: "Sandbox",
    settings: GenerationSettings,
    file: RecordFile,
    advance: Callable[[int], Any],
) -> None:
    """Complete the problems and run what comes; a record per problem: `samples`, `verdicts`, `details`.

    Args:
        turn: The model's.
        problems: Of a benchmark.
        sandbox: Runs the programs.
        settings: Of the completions.
        file: Where the records go; problems it holds are not run again.
        advance: Told how many problems are done.
    """
    prompts = prompt_tokens(turn.tokenizer, [problem.prompt for problem in problems])
    done = [problem.id in file for problem in problems]
    advance(sum(done))
    for new in turn.complete(prompts, settings, [problem.stop for problem in problems], done):
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
