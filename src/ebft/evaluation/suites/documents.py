"""Held-out documents: cross-entropy, feature-matching loss, calibration, diversity (`document_measures`)."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import feature_models, pretrained
from ...data import load_documents, tokenize_documents
from ...extras import version_of
from ...features import FeatureNetwork
from ...support import check_config, check_same_vocabulary
from ..document_measures import measure_documents, prompt_groups
from ..feature_matching import fixed_kernels
from ..intervals import DocumentMean
from ..records import Record, RecordFile
from ..settings import LENGTHS
from ..summary import means_of
from .base import Session, Suite, Turn


class DocumentSuite(Suite):
    """Documents as the first model's tokenizer cuts them, the same for all models.

    Raises:
        ValueError: A model or the dataset cannot be used, or vocabularies differ.
    """

    def __init__(self, session: Session):
        self.session, config = session, session.config
        self.tokenizer, self.network, self.described = session.tokenizers[0], None, None
        self.kernels: dict[str, Any] = {}
        max_length = self._max_length()
        self._check_vocabularies()
        name = str(config.dataset_name)
        split = "train" if Path(name).is_file() else config.dataset_test_split
        dataset: Any = load_documents(name, split=split, config=config.dataset_config)
        if config.max_documents is not None:
            dataset = dataset.select(range(min(len(dataset), config.max_documents)))
        label = f"dataset_name={name!r}"
        self.settings = config.document_settings((1,))
        options: dict[str, Any] = {"max_length": max_length, "dataset_label": label, "with_rows": True}
        options |= {name: getattr(config, name) for name in ("split_turns", "reasoning_tags")}
        options["needs_turns"] = self.settings.samples
        self.documents: list[Any] = list(tokenize_documents(dataset, self.tokenizer, **options))
        self._name_prompts(dataset)
        if self.settings.samples:
            lengths = fitting_lengths(self.documents, config.lengths, config.context_length)
            self.settings = config.document_settings(lengths)
        self.axes = self.settings.axes

    def _name_prompts(self, dataset: Any) -> None:
        """Give documents the text of their prompt: in which tokens that ends depends on the answer.

        Not where an answer stands behind more than that: behind earlier turns, or behind its own reasoning.
        """
        rows = [document.pop("row") for document in self.documents]
        documents = Counter(rows)
        for index, document in zip(rows, self.documents, strict=True):
            row = dataset[index]
            if (
                {"prompt", "completion"} <= row.keys()
                and documents[index] == 1
                and not self.session.config.reasoning_tags
            ):
                document["prompt"] = json.dumps([row.get(x) for x in ("prompt", "tools", "chat_template_kwargs")])

    def _max_length(self) -> int:
        """Tokens of a document, which all models and the feature network can take."""
        config, configs = self.session.config, list(self.session.model_configs)
        phi = config.feature_model_name_or_path
        if phi and "feature_matching" in config.metrics:
            configs.append(pretrained.load_config(phi, "feature_model_name_or_path"))
            check_same_vocabulary(configs[-1], phi, configs[0], self.tokenizer)
        length = config.max_length or min(longest_document(found) for found in configs)
        for found in configs:
            check_config(found, length, completions=0)  # rollouts need not share a row
        return length

    def _check_vocabularies(self) -> None:
        first, *others = self.session.config.model_name_or_path
        for path, tokenizer in zip(others, self.session.tokenizers[1:], strict=True):
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(
                    f"model_name_or_path: {path} has another vocabulary than {first}, so that their documents would "
                    "not be the same tokens: evaluate them apart (code_benchmark, translation and tasks compare any "
                    "models)."
                )

    def prepare(self) -> dict[str, Any]:
        """Load the one feature network, if one is needed, and fix the kernels by it."""
        if "feature_matching" not in self.settings.measures:
            return {}
        config = self.session.config
        model = self.session.load(config.feature_model_name_or_path or config.model_name_or_path[0])
        layers: Any = config.feature_layers  # numbers by now
        self.network = FeatureNetwork(model, layers, norm=config.feature_norm)
        self.described = feature_models.describe_feature_network(self.network)
        self.kernels = fixed_kernels(self.network, self.documents, self.settings)
        self.network.model.to("cpu")  # until it is needed: another suite may want the memory
        return {"feature_network": self.described} | ({"kernels": self.kernels} if self.kernels else {})

    def open_records(self, turn: Turn) -> None:
        """Those of the documents."""
        self._file(turn)

    def _file(self, turn: Turn) -> RecordFile:
        about = asdict(self.settings) | {"phi": self.described}
        del about["batch_size"]  # no rollout depends on its neighbours
        if not self.settings.kernels:
            del about["kernels"]  # as in records from before there were any
        if "diversity" in self.settings.measures:
            about["self_bleu"] = version_of("sacrebleu")
        return turn.records("documents", about, self.documents)

    def measure(self, turn: Turn) -> dict[str, DocumentMean]:
        """All measures; a unit is a document, or the documents of one prompt."""
        file = self._file(turn)
        groups = prompt_groups(self.documents)
        left = [group for group in groups if group[0]["document_id"] not in file]
        with turn.progress("documents", len(self.documents)) as advance:
            advance(len(self.documents) - sum(map(len, left)))
            sizes = {group[0]["document_id"]: len(group) for group in left}
            for records in self._measured(turn, left):
                file.append(records)
                advance(sum(sizes[record["id"]] for record in records))
        return means_of(file.records.values())

    def _measured(self, turn: Turn, left: list[list[dict]]) -> Iterator[list[Record]]:
        """Records of groups of documents; without any, the model need not be loaded."""
        if not left:
            return
        if self.network is not None:
            self.network.model.to(self.session.device)
        yield from measure_documents(turn.model, self.network, left, self.settings, turn.tokenizer, self.kernels)
        if self.network is not None:
            self.network.model.to("cpu")  # another suite may want the memory


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
        raise ValueError(
            f"dataset_name: no document has a token behind a prefix of context_length={context_length}: lower it, or "
            "give longer documents."
        )
    lengths = tuple(length for length in LENGTHS if length <= typical)
    if lengths[-1] < LENGTHS[-1]:
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
