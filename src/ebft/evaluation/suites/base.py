"""What every suite shares: the evaluation it is part of, a model's turn in it, and what a suite has to say."""

import gc
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ... import pretrained
from ..._compat import revision_of
from ...extras import require
from ..config import EvaluationConfig
from ..generation import check_room, complete
from ..intervals import DocumentMean
from ..records import RECORDS, RecordFile
from ..settings import GenerationSettings
from ..summary import Row
from ..vllm_generation import VLLMEngine
from ..weights import check_weights


class Session:
    """One call of `evaluate`: its settings, where it runs, and what it writes to.

    Raises:
        ValueError: The device is not there, or a model has no config or tokenizer.
    """

    def __init__(self, config: EvaluationConfig, console: Console):
        self.config, self.console, self.folder = config, console, Path(config.output_dir)
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        if config.generation_engine == "vllm":
            require("vllm", "vllm", "generation_engine='vllm'")
            self._check_vllm_device()
        self.model_configs = [pretrained.load_config(path) for path in config.model_name_or_path]
        for path in config.model_name_or_path:
            check_weights(path)
        if config.feature_model_name_or_path:
            pretrained.load_config(config.feature_model_name_or_path, "feature_model_name_or_path")
            check_weights(config.feature_model_name_or_path, "feature_model_name_or_path")
        self.longest_prompt = 0
        self.tokenizers = [pretrained.load_tokenizer(path) for path in config.model_name_or_path]

    def _check_vllm_device(self) -> None:
        if self.device.index:
            raise ValueError(
                f"device={self.config.device!r}: vLLM takes the first GPU it sees; set CUDA_VISIBLE_DEVICES="
                f"{self.device.index} and leave device out."
            )

    def load(self, path: str) -> Any:
        """A model, ready to be measured.

        Raises:
            ValueError: A weight is not finite: rollouts of such a model would have numbers like any other's.
        """
        config = pretrained.load_config(path)
        model: Any = pretrained.read_weights(path, config, self.dtype, pretrained.attention_options(config))
        model = model.to(self.device).eval()
        for name, weight in model.named_parameters():
            if weight.dtype == self.dtype and not torch.stack(weight.aminmax()).isfinite().all():
                raise ValueError(f"{path}: the weight {name} holds NaN or infinite numbers: take another checkpoint.")
        return model

    def turns(self) -> Iterator["Turn"]:
        """The models, one after the other."""
        for name, path, tokenizer in zip(
            self.config.names, self.config.model_name_or_path, self.tokenizers, strict=True
        ):
            yield Turn(self, name, path, tokenizer)

    def check_room(self, names: Sequence[str], prompts: Sequence[str]) -> None:
        """Refuse prompts that some model has no positions for.

        Raises:
            ValueError: Names the first one.
        """
        for model_config, tokenizer in zip(self.model_configs, self.tokenizers, strict=True):
            tokens = prompt_tokens(tokenizer, prompts)
            check_room(tokens, names, model_config, self.config.max_new_tokens)
            self.longest_prompt = max(self.longest_prompt, *map(len, tokens))

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Any]:
        """A bar on the console; yields what to tell how many more are done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left:"))
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda count: progress.advance(task, count)


class Turn:
    """One model's turn: the model, in memory from when it is first needed, and its records."""

    def __init__(self, session: Session, name: str, path: str, tokenizer: Any):
        self.session, self.name, self.path, self.tokenizer = session, name, path, tokenizer

    @cached_property
    def model(self) -> Any:
        """The model, on the session's device."""
        return self.session.load(self.path)

    @cached_property
    def vllm(self) -> VLLMEngine:
        """The model in vLLM, which wants the memory for itself."""
        self.release()
        config, dtype = self.session.config, str(self.session.dtype).removeprefix("torch.")
        longest = self.session.longest_prompt + config.max_new_tokens
        return VLLMEngine(self.path, self.tokenizer, dtype, config.seed, config.vllm_gpu_memory_utilization, longest)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        stop: Sequence[tuple[str, ...]],
        done: Sequence[bool],
    ) -> Iterator[dict[int, list[str]]]:
        """The new completions, in batches, of prompts that are not `done`; see `generation.complete`."""
        if all(done):
            return
        if self.session.config.generation_engine == "vllm":
            yield from self.vllm.complete(prompts, settings, stop, done)
            return
        for found in complete(self.model, self.tokenizer, prompts, settings, stop, done):
            yield {i: texts for i, texts in found.items() if not done[i]}

    def release(self) -> None:
        """Give the model's memory back; it is loaded again when it is needed again."""
        self.__dict__.pop("model", None)
        if "vllm" in self.__dict__:
            self.__dict__.pop("vllm").close()
        gc.collect()
        torch.cuda.empty_cache()

    def records(self, kind: str, settings: dict[str, Any], data: Any) -> RecordFile:
        """What is known already of this model, with these settings and data.

        Raises:
            ValueError: The folder holds records of another state of the model, other settings or other data.
        """
        identity = {"model": self.path, "state": _fingerprint(self.path)}
        identity["dtype"] = str(self.session.dtype).removeprefix("torch.")
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        path = self.session.folder / RECORDS / f"{self.name}-{kind}.jsonl".replace("/", "_")
        return RecordFile(path, {**identity, **settings, "data": digest})

    def progress(self, text: str, total: int) -> Any:
        """The session's bar, with the model's name."""
        return self.session.progress(f"{self.name}: {text}", total)


class Suite(ABC):
    """Something that models are measured on.

    A suite loads and checks everything when it is made, so that bad input ends the call before any work.

    Attributes:
        axes: Of each measure that is a curve, what its numbers belong to.
    """

    axes: Mapping[str, Sequence[int]] = {}

    def prepare(self) -> dict[str, Any]:
        """What is loaded once all suites are found to be usable; returns what results.json shall say of it."""
        return {}

    @abstractmethod
    def open_records(self, turn: Turn) -> None:
        """Refuse, before any work, records of a model that are of something else.

        Raises:
            ValueError: Names the folder and what differs.
        """

    @abstractmethod
    def measure(self, turn: Turn) -> dict[str, DocumentMean]:
        """Measure a model: measure -> a sum and a count of each unit, the same units for every model."""

    def rows(self) -> list[Row]:
        """After all models: numbers that are no means over units."""
        return []


def generation_identity(settings: GenerationSettings, engine: str) -> dict[str, Any]:
    """What completions depend on; on the size of a batch only transformers' sampling, whose noise is a batch's."""
    about = asdict(settings) | {"engine": engine}
    if engine != "transformers" or not settings.temperature:
        del about["batch_size"]
    return about


def prompt_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Prompts as training tokenises them: each by itself, with the tokenizer's own special tokens."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def _fingerprint(path: str) -> Any:
    """What tells one state of a model from another: a Hub model's commit, or its files' fingerprint."""
    if not Path(path).is_dir():
        return revision_of(pretrained.load_config(path))
    return files_fingerprint(Path(path).iterdir())  # results may stand in a folder below


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Names, sizes and times of files, as a short text; folders are left out."""
    files = [file for file in sorted(paths) if file.is_file()]
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
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
