"""`evaluate`: several models on the same documents, problems and segments, with one feature network and one seed."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM

from .. import models as loading
from .._compat import revision_of
from ..data import load_documents, tokenize_documents
from ..features import FeatureNetwork
from ..support import check_config, check_same_vocabulary
from . import report
from .code_benchmarks import check_languages, load_problems
from .config import EvaluationConfig, short_names
from .documents import measure_documents, prompt_groups
from .generation import check_room
from .intervals import DocumentMean
from .records import RecordFile
from .summary import BY_POSITION, Row, means_of, summarise
from .tasks import pass_records, prompt_tokens, run_code, run_translation
from .translation import check_template, load_translations, translation_prompt, translation_scores


def evaluate(config: EvaluationConfig, console: Console | None = None) -> list[Row]:
    """Measure everything that `config` asks for, and write, show and plot it.

    An interrupted call goes on where it stopped: what is measured of a document, problem or segment is kept in
    `output_dir/records` and not measured again.

    Args:
        config: What of which models.
        console: Where tables and progress go; the terminal if None.

    Returns:
        Rows of model, measure, length, mean, low, high, units; also in `output_dir/results.json` and `.csv`.

    Raises:
        ValueError: A model, dataset, benchmark or setting cannot be used; before anything is generated.
    """
    return _Evaluation(config, console or Console()).run()


class _Evaluation:
    """One call of `evaluate`: everything is loaded and checked first, then the models take their turns."""

    def __init__(self, config: EvaluationConfig, console: Console):
        self.config, self.console = config, console
        self.folder = Path(config.output_dir)
        report.check_folder(self.folder, asdict(config))
        for wanted, package, extra in (
            (config.plots, "matplotlib", "plot"),
            (config.translation, "sacrebleu", "translation"),
            (config.tasks, "lm_eval", "lm-eval"),
        ):
            if wanted and find_spec(package) is None:
                raise ValueError(f"{package} is needed for this and not installed: pip install 'ebft[{extra}]'")
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        first = config.model_name_or_path[0]
        self.configs = [loading.load_config(name) for name in config.model_name_or_path]
        self.tokenizer = loading.load_tokenizer(first)
        self.documents, self.settings = [], None
        if config.dataset_name:
            self._load_documents(config.dataset_name)
        self.problems = {
            short: load_problems(name, config=config.code_benchmark_config)
            for short, name in zip(short_names(config.code_benchmark), config.code_benchmark, strict=True)
        }
        for problems in self.problems.values():
            check_languages(problems)
        self.segments = []
        if config.translation:
            check_template(config.translation_template)
            self.segments = load_translations(config.translation, direction=config.translation_direction)
        self.prompts: list[str] = []
        if self.segments:
            self.prompts = [translation_prompt(segment, config.translation_template) for segment in self.segments]
        self._check_room()
        self.sandbox: Any = self._sandbox() if self.problems else None
        self.translations: dict[str, list[list[str]]] = {}

    def _load_documents(self, name: str) -> None:
        config, phi = self.config, self.config.feature_model_name_or_path
        configs = list(self.configs)
        if phi and "feature_matching" in config.metrics:
            configs.append(loading.load_config(phi, "feature_model_name_or_path"))
            check_same_vocabulary(configs[-1], phi, self.configs[0], self.tokenizer)
        length = config.max_length or min(longest_document(found) for found in configs)
        for found in configs:
            check_config(found, length)
        split = "train" if Path(name).is_file() else config.dataset_test_split
        dataset: Any = load_documents(name, split=split, config=config.dataset_config)
        if config.max_documents is not None:
            dataset = dataset.select(range(min(len(dataset), config.max_documents)))
        self.documents = list(tokenize_documents(dataset, self.tokenizer, max_length=length))
        for path in config.model_name_or_path[1:]:
            if loading.load_tokenizer(path).get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(
                    f"model_name_or_path: {path} has another vocabulary than {config.model_name_or_path[0]}, so that "
                    "their documents would not be the same tokens: evaluate them apart (code_benchmark, translation "
                    "and tasks compare any models)."
                )
        lengths = fitting_lengths(self.documents, config.lengths, config.context_length)
        self.settings = config.document_settings(lengths)

    def _check_room(self) -> None:
        """Refuse prompts that some model has no positions for."""
        asked = [(problem.id, problem.prompt) for problems in self.problems.values() for problem in problems]
        asked += [(f"segment {i}", prompt) for i, prompt in enumerate(self.prompts)]
        for found, path in zip(self.configs, self.config.model_name_or_path, strict=True):
            if asked:
                names, texts = zip(*asked, strict=True)
                tokens = prompt_tokens(loading.load_tokenizer(path), texts)
                check_room(tokens, names, found, self.config.max_new_tokens)

    def _sandbox(self) -> Any:
        from ..sandbox import Limits, Sandbox

        config = self.config
        limits = Limits(wall_seconds=config.time_limit, cpu_seconds=config.time_limit)
        sandbox = Sandbox(limits, allow_weak=config.allow_weak_sandbox)
        self.console.print(f"Generated code runs in: {sandbox.layer}", highlight=False)
        return sandbox

    def run(self) -> list[Row]:
        """Measure model after model, then report."""
        network = self._feature_network()
        measured: dict[str, dict[str, DocumentMean]] = {}
        for name, path in zip(self.config.names, self.config.model_name_or_path, strict=True):
            measured[name] = self._measure(name, path, network)
        rows = summarise(measured, self._lengths())
        rows += self._translation_rows()
        rows += self._task_rows()
        self._report(rows, network)
        return rows

    def _feature_network(self) -> FeatureNetwork | None:
        if self.settings is None or "feature_matching" not in self.settings.measures:
            return None
        name = self.config.feature_model_name_or_path or self.config.model_name_or_path[0]
        layers, norm = self.config.feature_layers, self.config.feature_norm
        network = FeatureNetwork(self._load(name), layers, norm=norm)
        return network

    def _load(self, path: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, attn_implementation="sdpa")
        return model.to(self.device).eval()

    def _measure(self, name: str, path: str, network: FeatureNetwork | None) -> dict[str, DocumentMean]:
        """Everything of one model that is a mean over documents or problems."""
        model = self._load(path) if self.documents or self.problems or self.segments else None
        tokenizer = loading.load_tokenizer(path) if self.problems or self.segments else self.tokenizer
        identity = {"model": path, "state": _fingerprint(path), "dtype": str(self.dtype).removeprefix("torch.")}
        means = {}
        if self.settings is not None:
            means |= means_of(self._measure_documents(name, model, network, identity))
        for benchmark, problems in self.problems.items():
            means |= means_of(self._measure_code(name, model, tokenizer, benchmark, problems, identity))
        if self.segments:
            self.translations[name] = self._translate(name, model, tokenizer, identity)
        return means

    def _measure_documents(self, name: str, model: Any, network: FeatureNetwork | None, identity: dict) -> list[dict]:
        assert self.settings is not None
        phi = None if network is None else loading.describe_feature_network(network)
        file = self._records(name, "documents", identity | asdict(self.settings), self.documents, {"phi": phi})
        groups = prompt_groups(self.documents)
        left = [group for group in groups if group[0]["document_id"] not in file]
        total = sum(map(len, groups))
        with self._progress(f"{name}: documents", total) as advance:
            advance(total - sum(map(len, left)))
            sizes = {group[0]["document_id"]: len(group) for group in left}
            for records in measure_documents(model, network, left, self.settings, self.tokenizer):
                file.append(records)
                advance(sum(sizes[record["id"]] for record in records))
        return list(file.records.values())

    def _measure_code(self, name: str, model, tokenizer, benchmark: str, problems, identity: dict) -> list[dict]:
        config, records = self.config, []
        runs = {"greedy": (config.greedy(), [1])}
        if config.num_samples > 1:
            runs["sampled"] = config.sampled(config.num_samples), config.pass_at_k
        for kind, (settings, ks) in runs.items():
            about = identity | asdict(settings) | {"time_limit": config.time_limit, "sandbox": self.sandbox.layer}
            file = self._records(name, f"{benchmark}-{kind}", about, [asdict(problem) for problem in problems])
            with self._progress(f"{name}: {benchmark}, {kind}", len(problems)) as advance:
                run_code(model, tokenizer, problems, self.sandbox, settings, file, advance)
            records += pass_records(list(file.records.values()), ks, f"{benchmark}/{kind}")
        return records

    def _translate(self, name: str, model, tokenizer, identity: dict) -> list[list[str]]:
        """Of each segment the greedy translation, then the sampled ones: together `best_of`."""
        config = self.config
        runs = {"greedy": config.greedy()}
        if config.best_of > 1:
            runs["sampled"] = config.sampled(config.best_of - 1)
        found: list[list[str]] = [[] for _ in self.segments]
        for kind, settings in runs.items():
            about = identity | asdict(settings)
            file = self._records(name, f"translation-{kind}", about, self.prompts)
            with self._progress(f"{name}: translation, {kind}", len(self.segments)) as advance:
                run_translation(model, tokenizer, self.prompts, settings, file, advance)
            for i, texts in enumerate(found):
                texts += file.records[i]["hypotheses"]
        return found

    def _records(self, name: str, kind: str, settings: dict, data: Any, more: dict | None = None) -> RecordFile:
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        path = self.folder / "records" / f"{name}-{kind}.jsonl".replace("/", "_")
        return RecordFile(path, settings | (more or {}) | {"data": digest})

    def _translation_rows(self) -> list[Row]:
        """Corpus scores, with sacrebleu's own bootstrap over segments."""
        rows: list[Row] = []
        for name, hypotheses in self.translations.items():
            for score in translation_scores(self.segments, hypotheses):
                if not rows or all(row["signature"] != score.signature for row in rows):
                    self.console.print(f"{score.metric}: {score.signature}", highlight=False, style="dim")
                measure = f"{score.direction}/{score.metric} ({score.hypotheses})"
                low, high = score.mean - score.half_width, score.mean + score.half_width
                units = sum(segment.direction == score.direction for segment in self.segments)
                rows.append(
                    dict(model=name, measure=measure, length=None, mean=score.score, low=low, high=high)
                    | {"units": units, "signature": score.signature}
                )
        return rows

    def _task_rows(self) -> list[Row]:
        if not self.config.tasks:
            return []
        from .harness import run_tasks

        rows: list[Row] = []
        for name, path in zip(self.config.names, self.config.model_name_or_path, strict=True):
            dtype = str(self.dtype).removeprefix("torch.")
            options: Any = dict(
                limit=self.config.tasks_limit, device=str(self.device), seed=self.config.seed, dtype=dtype
            )
            for score in run_tasks(path, self.config.tasks, **options):
                spread = 1.96 * score.stderr if score.stderr is not None else 0.0
                low, high, measure = score.value - spread, score.value + spread, f"{score.task}/{score.metric}"
                rows.append(dict(model=name, measure=measure, length=None, mean=score.value, low=low, high=high))
        return rows

    def _lengths(self) -> dict[str, Any]:
        if self.settings is None:
            return {}
        lengths, positions = self.settings.lengths, range(1, max(self.settings.lengths) + 1)
        curves: Any = [f"feature_matching_{name}" for name in ("loss", "shared", "floor", "excess")]
        return {**dict.fromkeys(curves, lengths), **dict.fromkeys(BY_POSITION, positions)}

    def _report(self, rows: list[Row], network: FeatureNetwork | None) -> None:
        names = self.config.names
        about = {
            "config": asdict(self.config),
            "models": dict(zip(names, self.config.model_name_or_path, strict=True)),
        }
        if network is not None:
            about["feature_network"] = loading.describe_feature_network(network)
        report.save(self.folder, rows, about)
        report.show(self.console, rows, names, "Means and 95 % intervals over documents or problems")
        pairs = list(dict.fromkeys(row["model"] for row in rows if row["model"] not in names))
        if pairs:
            report.show(self.console, rows, pairs, "Paired differences: same documents, same noise")
        plots = report.plot(self.folder, rows, names) if self.config.plots else []
        written = [self.folder / report.RESULTS, self.folder / report.NUMBERS, *plots]
        self.console.print("Written: " + ", ".join(map(str, written)), highlight=False)

    @contextmanager
    def _progress(self, text: str, total: int) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left:"))
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda count: progress.advance(task, count)


def longest_document(config: Any) -> int:
    """Tokens of the longest document that a model is given by default."""
    return min(1024, getattr(config.get_text_config(), "max_position_embeddings", None) or 1024)


def fitting_lengths(documents: Sequence[dict], wanted: Sequence[int], context_length: int) -> tuple[int, ...]:
    """The completion lengths asked for, or the default ones that half of the documents have room for.

    Raises:
        ValueError: No document has room for the longest of `wanted`, or for a single token.
    """
    rooms = sorted((_room(document, context_length) for document in documents), reverse=True)
    if wanted:
        if max(wanted) > rooms[0]:
            raise ValueError(
                f"lengths={list(wanted)}: no document has room for {max(wanted)} tokens behind a prefix of "
                f"context_length={context_length}; the longest completion that fits is {rooms[0]}."
            )
        return tuple(wanted)
    typical = max(rooms[len(rooms) // 2], min(1, rooms[0]))
    if not typical:
        raise ValueError(f"dataset_name: no document has a token behind a prefix of context_length={context_length}.")
    lengths = tuple(length for length in (1, 2, 4, 8, 16, 32, 64) if length <= typical)
    if lengths[-1] < 64:
        warnings.warn(
            f"lengths end at {lengths[-1]} tokens: half of the documents have no room for more (give --lengths for "
            "longer ones, of the documents that have)",
            stacklevel=2,
        )
    return lengths


def _room(document: dict, context_length: int) -> int:
    """The longest run of completion tokens that a context of the document has behind it."""
    longest, run = 0, 0
    for place in reversed(range(len(document["input_ids"]))):
        run = run + 1 if document["completion_mask"][place] else 0
        if place >= context_length:
            longest = max(longest, run)
    return longest


def _fingerprint(path: str) -> Any:
    """What tells one state of a model from another: a Hub model's commit, or names, sizes and times of its files."""
    if not Path(path).is_dir():
        return revision_of(loading.load_config(path))
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(path).iterdir())]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _device(name: str | None) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        ValueError: There is none.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is unknown: use cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: this machine, or this build of torch, has no CUDA device; use cpu.")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)
