"""What weights and checkpoints may be: no pickles, which run code when read, and files of their own folder alone."""

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers.utils import has_file

from ._compat import deepspeed_classes, deepspeed_reads_data_alone
from .checkpoints import SHARDS

# For `from_pretrained`: also of a model whose config asks for code of its own, without a question on the terminal.
SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}

# An index names the files of weights in several parts. An adapter stands on a base model, found through its config.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")

# What `.metadata` of a sharded checkpoint (FSDP) may name; torch reads that file without restriction.
METADATA = "torch.distributed.checkpoint.metadata"
NAMES_OF_METADATA = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in ("Size", "float64", "float32", "float16", "bfloat16", "bool", "uint8")),
    *(("torch", name) for name in ("int8", "int16", "int32", "int64")),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("collections", name) for name in ("OrderedDict", "defaultdict")),
}


def check_options(kwargs: dict[str, Any]) -> None:
    """Refuse options of `from_pretrained` that would read a pickle.

    Raises:
        ValueError: Names the option.
    """
    for name in ("use_safetensors", "weights_only"):
        if kwargs.get(name, True) is not True:
            raise ValueError(
                f"model_init_kwargs: {name}={kwargs[name]} would read weights from a pickle, which can run code: "
                "remove it."
            )


def check_weights_are_no_pickle(name: str, field: str) -> None:
    """Refuse a model whose weights are there as pickles alone.

    Args:
        name: A folder, or a name on the Hub.
        field: The option that `name` comes from, for messages.

    Raises:
        ValueError: Says how to convert them.
    """
    found = next((file for file in PICKLES if _has(name, file)), None)
    if found is not None and not any(_has(name, file) for file in SAFETENSORS):
        raise ValueError(
            f"{field}='{name}' has its weights in {found}, a pickle, which can run code when it is read: convert them "
            "to safetensors (docs/safety.md has the command), or take a model that has them."
        )


def check_indices(name: str, field: str) -> None:
    """Refuse a folder with an index of weights that names files elsewhere.

    Args:
        name: A folder, or a name on the Hub, which has no files elsewhere.
        field: The option that `name` comes from, for messages.

    Raises:
        ValueError: Names the index and the file.
    """
    for index in sorted(Path(name).glob("*.safetensors.index*.json")):
        parts_of(index, field)


def parts_of(file: Path, field: str) -> list[Path]:
    """The files that hold the weights: the file itself, or those its index names.

    Raises:
        ValueError: It is no index, or names a file that is not in its folder; `field` is what the error calls it.
    """
    if file.suffix != ".json":
        return [file]
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{field}: {file} is no index of weights ({error!r}): copy or download it again.") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{field}: {file} names {outside[0]!r}, which is not in its folder: take another copy of it.")
    return [file.with_name(name) for name in sorted(names)]


def _has(name: str, file: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    with suppress(OSError, ValueError):  # no such name, or no network
        return has_file(name, file)
    return False


@contextmanager
def resuming(checkpoint: str | Path | None) -> Iterator[None]:
    """Around a training that resumes: nothing that the checkpoint holds is run.

    transformers reads optimiser, schedule and random states with `weights_only`, which refuses all but data.

    Raises:
        ValueError: A file of the checkpoint is a pickle of more than data.
    """
    reading = ExitStack()
    if checkpoint is not None:
        check_weights_are_no_pickle(str(checkpoint), "resume_from_checkpoint")
        check_indices(str(checkpoint), "resume_from_checkpoint")
        for path in sorted(Path(checkpoint).rglob(".metadata")):
            _check_metadata(path)
        for path in sorted(Path(checkpoint).glob(f"{SHARDS['DeepSpeed']}/*.pt")):
            _check_states(path)
        if any(Path(checkpoint).glob(SHARDS["DeepSpeed"])):  # else DeepSpeed is not imported, nor goes on with it
            reading.enter_context(deepspeed_reads_data_alone())
    try:
        with reading:
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"resume_from_checkpoint='{checkpoint}': one of its .pt or .pth files holds more than data or is damaged, "
            "and was not read: resume from another checkpoint."
        ) from error


def _check_states(path: Path) -> None:
    """Name the file on all processes, before any of them reads its own; from the disk only as far as it needs."""
    try:
        with torch.serialization.safe_globals(deepspeed_classes()):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {path} holds more than data or is damaged: resume from another checkpoint."
        ) from error


class _DataAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES_OF_METADATA:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _check_metadata(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            _check_values(path.parent, _DataAlone(file).load())
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {path} holds more than data or is damaged ({error}): resume from another "
            "checkpoint."
        ) from error


def _check_values(folder: Path, metadata: Any) -> None:
    """What is no tensor (an optimiser's settings) is pickled beside them, and torch reads it without restriction."""
    for index, place in metadata.storage_data.items():
        if Path(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"{index.fqn} is in {place.relative_path}, not in that folder")
        if not isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            continue
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            text = file.read(place.length)
        try:
            torch.load(io.BytesIO(text), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise pickle.UnpicklingError(f"{index.fqn} is more than data") from error
