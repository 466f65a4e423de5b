"""The settings of an evaluation; the help text of each is its documentation."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

from ..credentials import check_no_credentials
from .comet import MODEL
from .pass_at_k import check_k
from .settings import KERNELS, MEASURES, DocumentSettings, GenerationSettings
from .translation import TEMPLATE

SETTINGS_OF = {
    "dataset_name": (
        "dataset_config",
        "dataset_test_split",
        "max_documents",
        "max_length",
        "split_turns",
        "reasoning_tags",
        "metrics",
        "lengths",
        "kernels",
        "num_generations",
        "contexts_per_document",
        "context_length",
        "temperature",
        "feature_model_name_or_path",
        "feature_layers",
        "feature_norm",
    ),
    "code_benchmark": (
        "code_benchmark_config",
        "code_benchmark_split",
        "pass_at_k",
        "num_samples",
        "time_limit",
        "allow_weak_sandbox",
    ),
    "translation": (
        "translation_config",
        "translation_split",
        "translation_direction",
        "translation_template",
        "language_names",
        "best_of",
        "comet",
    ),
    "comet": ("comet_model",),
    "tasks": ("tasks_limit",),
}
OF_THE_HUB = (
    ("dataset_name", ("dataset_config", "dataset_test_split")),
    ("code_benchmark", ("code_benchmark_config",)),  # of a file with all of MBPP, the split is chosen
    ("translation", ("translation_config", "translation_split")),
)
AT_LEAST_1 = (
    *("max_documents", "max_length", "tasks_limit", "best_of"),
    *("num_samples", "max_new_tokens", "generation_batch_size"),
)
OF_ROLLOUTS = ("lengths", "num_generations", "contexts_per_document", "context_length", "temperature")
OF_FEATURES = ("kernels", "feature_model_name_or_path", "feature_layers", "feature_norm")
OF_COMPLETIONS = ("max_new_tokens", "generation_engine")


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class EvaluationConfig:
    """What `ebft evaluate` measures of which models; field descriptions are in the metadata of each."""

    model_name_or_path: list[str] = _setting(
        [], "Models to evaluate: Hub names, or folders. The first is compared to."
    )
    output_dir: str = _setting("", "Where results go. Default: runs/evaluation-MODELS.")
    dataset_name: str | None = _setting(None, "Held-out documents: a name on the Hub, a local file or a folder.")
    dataset_config: str | None = _setting(None, "Configuration of a dataset on the Hub.")
    dataset_test_split: str = _setting("test", "Split to evaluate on; a single file is taken whole.")
    max_documents: int | None = _setting(None, "Take only the first so many documents.")
    max_length: int | None = _setting(
        None, "Longest document, in tokens. Default: 1024, or as long as the models allow."
    )
    split_turns: bool | None = _setting(
        None,
        "Each assistant turn is a document of its own, behind the history that the model sees. Default: as in "
        "training.",
    )
    reasoning_tags: list[str] | None = _setting(
        None, "Opening and closing tag of reasoning, which stays as context. Default: none."
    )
    metrics: list[str] = _setting(list(MEASURES), f"Measures of the documents: {', '.join(MEASURES)}.")
    lengths: list[int] = _setting(
        [], "Completion lengths of the rollouts. Default: 1, 2, 4, ... 64, as far as they fit."
    )
    kernels: list[str] = _setting(
        [], f"Feature-matching loss under these kernels too, from the same rollouts: {', '.join(KERNELS)}."
    )
    num_generations: int = _setting(8, "Rollouts per context.")
    contexts_per_document: int = _setting(4, "At most so many places of a document are continued.")
    context_length: int = _setting(8, "Shortest prefix of a rollout, in tokens.")
    temperature: float = _setting(1.0, "Of the rollouts. At 1 they are the model's own distribution.")
    batch_size: int = _setting(8, "Documents per forward.")
    seed: int = _setting(0, "Of all sampling; equal noise for every model.")
    dtype: str = _setting("auto", "Of the weights: auto (bfloat16 on a GPU that has it), float32 or bfloat16.")
    device: str | None = _setting(None, "Where. Default: a GPU if there is one.")
    feature_model_name_or_path: str | None = _setting(
        None, "The one feature network of all. Default: the first model."
    )
    feature_layers: list[str] = _setting(
        [0.25, 0.5, 0.75], "Which of its hidden states: fractions of its depth, or integers into hidden_states."
    )
    feature_norm: str = _setting("joint", "joint, per_layer or none.")
    code_benchmark: list[str] = _setting([], "HumanEval, MBPP, MultiPL-E or own problems: files or Hub names.")
    code_benchmark_config: str | None = _setting(None, "Hub configuration of the code benchmarks.")
    code_benchmark_split: str = _setting("test", "Their split, of the Hub or of MBPP's file.")
    pass_at_k: list[int] = _setting([1], "k of pass@k; above 1, also of so many sampled completions.")
    num_samples: int = _setting(1, "Sampled completions per problem; 1 leaves sampling out (greedy only).")
    code_temperature: float = _setting(0.6, "Of the sampled completions and translations.")
    max_new_tokens: int = _setting(512, "Longest completion of a problem or segment, in tokens.")
    generation_engine: str = _setting("transformers", "Writes the completions: transformers or vllm.")
    vllm_gpu_memory_utilization: float = _setting(0.8, "vLLM's share of the GPU's memory.")
    generation_batch_size: int = _setting(64, "Completions at a time.")
    time_limit: float = _setting(10.0, "Seconds a program may run.")
    allow_weak_sandbox: bool = _setting(False, "Run generated code even where only resource limits protect.")
    translation: str | None = _setting(None, "Segments to translate: a file or a Hub name.")
    translation_config: str | None = _setting(None, "Its configuration on the Hub.")
    translation_split: str = _setting("test", "Its split on the Hub or in a folder.")
    translation_direction: str | None = _setting(None, "Such as de-en, where the data has both ways.")
    translation_template: str = _setting(TEMPLATE, "Prompt of a segment.")
    language_names: list[str] = _setting([], "Languages' names in the prompt where none is known: CODE=NAME ...")
    best_of: int = _setting(1, "Also the best of so many translations, greedy and sampled (sentence BLEU).")
    comet: bool = _setting(False, "Also COMET; make its environment first: python -m ebft.evaluation.comet")
    comet_model: str = _setting(MODEL, "COMET's checkpoint: a name it knows, or a file.")
    tasks: list[str] = _setting([], "Tasks of lm-evaluation-harness.")
    tasks_limit: int | None = _setting(None, "Only so many examples of each task.")
    plots: bool = _setting(True, "Draw plots as PNG and SVG.")

    def __post_init__(self) -> None:
        check_no_credentials(vars(self))
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path: missing; give one model or several.")
        self.kernels = list(self.kernels)
        names = self.names
        for field_name in ("model_name_or_path", "code_benchmark"):
            short = [name.replace("/", "_") for name in short_names(getattr(self, field_name))]
            if len(set(short)) < len(short):
                raise ValueError(f"{field_name}={getattr(self, field_name)}: two are called alike; rename one.")
        if not (self.dataset_name or self.code_benchmark or self.translation or self.tasks):
            raise ValueError(
                "dataset_name, code_benchmark, translation, tasks: all are missing; say what to measure on."
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: use auto, float32 or bfloat16.")
        if self.generation_engine not in ("transformers", "vllm"):
            raise ValueError(f"generation_engine={self.generation_engine!r}: use transformers or vllm.")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            share = self.vllm_gpu_memory_utilization
            raise ValueError(f"vllm_gpu_memory_utilization={share} must be in (0, 1].")
        self.feature_layers = [_layer(layer) for layer in self.feature_layers]
        self._check_wanted()
        self._check_files()
        for name in AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for pair in self.language_names:
            if not all(part.strip() for part in pair.partition("=")):
                raise ValueError(f"language_names: {pair!r} is not CODE=NAME, such as gsw=Alemannic.")
        if len(set(map(repr, self.feature_layers))) < len(self.feature_layers):
            raise ValueError(f"feature_layers={self.feature_layers}: one is there twice: remove it.")
        if self.reasoning_tags:
            from ..data.reasoning import check_tags  # its package imports torch

            check_tags(self.reasoning_tags)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**32.")
        if not 0 < self.time_limit < inf:
            raise ValueError(f"time_limit={self.time_limit} must be above 0, in seconds.")
        if self.code_benchmark:
            check_k(self.pass_at_k, self.num_samples)
        # These refuse what is out of range.
        self.document_settings((1,))
        self.greedy()
        if max(self.num_samples, self.best_of) > 1:
            self.sampled(max(self.num_samples, self.best_of))
        self.output_dir = self.output_dir or str(Path("runs") / f"evaluation-{'-'.join(names).replace('/', '_')}")

    def _check_wanted(self) -> None:
        """Refuse settings of what is not measured: something was forgotten."""
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        for wanted, names in SETTINGS_OF.items():
            for name in names:
                if not getattr(self, wanted) and getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name}={getattr(self, name)!r} needs --{wanted}, which is not given.")
        rollouts = any(name != "cross_entropy" for name in self.metrics)
        for wanted, names, needs in (
            (rollouts, OF_ROLLOUTS, "one of --metrics feature_matching calibration diversity"),
            ("feature_matching" in self.metrics, OF_FEATURES, "--metrics feature_matching"),
            (self.code_benchmark or self.translation, OF_COMPLETIONS, "--code_benchmark or --translation"),
            (max(self.num_samples, self.best_of) > 1, ("code_temperature",), "--num_samples or --best_of above 1"),
        ):
            for name in names:
                if not wanted and getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name}={getattr(self, name)!r} needs {needs}; without, it does nothing.")

    def _check_files(self) -> None:
        """Refuse splits and configurations of what is a local file, which has none."""
        for files, options in OF_THE_HUB:
            names = getattr(self, files) or []
            for option in options:
                given = getattr(self, option) != getattr(type(self), option)
                if given and all(
                    Path(x).expanduser().is_file() for x in ([names] if isinstance(names, str) else names)
                ):
                    raise ValueError(f"{option}={getattr(self, option)!r} does nothing: {files}={names!r} is a file.")

    @property
    def names(self) -> list[str]:
        """What the models are called in tables and files."""
        return short_names(self.model_name_or_path)

    @property
    def named_languages(self) -> dict[str, str]:
        """Names of languages that the caller gave, by code."""
        pairs = (pair.split("=", 1) for pair in self.language_names)
        return {code.strip(): name.strip() for code, name in pairs}

    def document_settings(self, lengths: Sequence[int]) -> DocumentSettings:
        """The part that concerns documents."""
        options = {f.name: getattr(self, f.name) for f in fields(DocumentSettings) if hasattr(self, f.name)}
        lists = {"measures": tuple(self.metrics), "lengths": tuple(lengths), "kernels": tuple(self.kernels)}
        return DocumentSettings(**options | lists)

    def greedy(self) -> GenerationSettings:
        """One completion of each prompt, the likeliest token by token."""
        return GenerationSettings(1, self.max_new_tokens, batch_size=self.generation_batch_size, seed=self.seed)

    def sampled(self, count: int) -> GenerationSettings:
        """So many sampled completions of each prompt."""
        if not 0 < self.code_temperature < inf:
            raise ValueError(
                f"code_temperature={self.code_temperature} must be above 0 (at 0 samples are all alike) and finite."
            )
        size = self.generation_batch_size
        return GenerationSettings(count, self.max_new_tokens, self.code_temperature, batch_size=size, seed=self.seed)


def _layer(value: Any) -> Any:
    """An index where it is written as one (2), a fraction of the depth where it has a point (2.0).

    Raises:
        ValueError: It is no number.
    """
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ValueError(f"feature_layers: {value!r} is not a number: use 0.5, say, or an index such as 2.") from None


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path or Hub name, with the folder before it where two are alike."""
    paths = [Path(name) for name in names]
    short = [path.name or str(path) for path in paths]
    return [
        name if short.count(name) == 1 else "/".join(path.parts[-2:]) for name, path in zip(short, paths, strict=True)
    ]
