"""What data a comparison reads: it is there, and what is tested on has neither trained nor chosen anything."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..data.loading import looks_like_path
from .cells import file_digest
from .config import CompareConfig, Options

# Options that name data, each with those that say which part of it.
MEASURED = {
    "dataset_name": ("dataset_config", "dataset_test_split"),
    "code_benchmark": ("code_benchmark_config", "code_benchmark_split"),
    "translation": ("translation_config", "translation_split"),
}
TRAINED = {"dataset_name": ("dataset_config", "dataset_train_split")}
DEFAULTS = {"dataset_test_split": "test", "dataset_train_split": "train"}
ENDS = 2**20  # bytes of a file of weights, from either end, that tell it from others

Source = tuple[str, ...]


def check_sources(config: CompareConfig) -> None:
    """Refuse data that are not there, and the same data in two of training, validation and tests.

    Raises:
        ValueError: Names the option, the data and the other option.
    """
    training = {**config.train, "dataset_name": config.dataset_name}
    every = [("training", *source) for source in sources("", training, TRAINED)]
    for label, options in config.measured().items():
        kind = "validation" if label == "validation" else "test"
        every += [(kind, *source) for source in sources(f"{label}.", options)]
    seen: dict[Source, tuple[str, str]] = {}
    for kind, field, name, source in every:
        if looks_like_path(name) and not Path(name).expanduser().exists():
            raise ValueError(f"{field}={name!r}: there is no such file or folder.")
        other_kind, other = seen.setdefault(source, (kind, field))
        if other_kind != kind:
            why = "models are trained on it" if other_kind == "training" else "settings are chosen on it"
            raise ValueError(f"{field}={name!r}: the same data as {other}, and {why}; hold out others.")


def sources(
    label: str, options: Options, data: Mapping[str, tuple[str, ...]] = MEASURED
) -> Iterator[tuple[str, str, Source]]:
    """Each option's name, the data's, and what is the same for the same data.

    That is the content of a local file, and else the name with its part and split.
    """
    for field, parts in data.items():
        value = options.get(field) or []
        for name in [value] if isinstance(value, str) else map(str, value):
            path = Path(name).expanduser()
            place = str(path.resolve()) if path.exists() else name
            part = (str(options.get(part, DEFAULTS.get(part))) for part in parts)
            yield f"{label}{field}", name, (str(file_digest(name)),) if path.is_file() else (place, *part)


def validation_digest(config: CompareConfig) -> str:
    """What tells the options of the validation, its local files and the base model from others."""
    found = hashlib.sha256(repr(sorted(config.validation.items())).encode())
    for _, name, source in sources("", config.validation):
        found.update(repr((name, source)).encode())
    for path in sorted(Path(config.model_name_or_path).expanduser().glob("*.safetensors")):
        with open(path, "rb") as file:
            found.update(file.read(ENDS))
            size = file.seek(0, 2)
            file.seek(max(0, size - ENDS))
            found.update(file.read() + str(size).encode())
    return found.hexdigest()
