"""Whether a model's weights are there and whole, told from file names and headers before any work."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import has_file

# What `from_pretrained` looks for, in this order; an index names the files of weights in several parts. An adapter
# stands on a base model, which is found through its config.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def check_weights(name: str, field: str = "model_name_or_path") -> None:
    """Refuse a model without weights, whose turn may come hours from now; no tensor is read.

    Args:
        name: A folder, or a name on the Hub.
        field: The option that `name` comes from, for messages.

    Raises:
        ValueError: There are no weights, a part of them is missing, or a .safetensors file is cut off.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not any(has_file(name, file) for file in (*WEIGHTS, *ADAPTERS)):  # offline: in the cache
            raise ValueError(
                f"{field}: {name}: neither the Hub nor its cache here has weights of it ({', '.join(WEIGHTS[::2])}): "
                "look at its page, or at the network."
            )
        return
    found = next((folder / file for file in (*WEIGHTS, *ADAPTERS) if (folder / file).is_file()), None)
    if found is None:
        raise ValueError(
            f"{field}: {name} holds no weights ({', '.join(WEIGHTS[::2])}): name the folder that save_pretrained "
            "wrote, such as a run's checkpoint."
        )
    for part in _parts(found, field):
        if not part.is_file():
            raise ValueError(f"{field}: {name}: {part.name} is missing, which {found.name} names: copy it there.")
        if part.suffix == ".safetensors":
            try:
                with safe_open(part, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(
                    f"{field}: {name}: {part.name} is damaged or cut off ({error}): copy or download it again."
                ) from error


def _parts(file: Path, field: str) -> list[Path]:
    """The files that hold the weights: the file itself, or those its index names."""
    if file.suffix != ".json":
        return [file]
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{field}: {file} is no index of weights ({error!r}): copy or download it again.") from error
    return [file.with_name(name) for name in sorted(names)]
