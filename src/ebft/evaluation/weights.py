"""Whether a model's weights are there and whole, told from file names and headers before any work."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import has_file

from ..data.loading import looks_like_path
from ..pickles import SAFETENSORS, check_weights_are_no_pickle, parts_of


def check_weights(name: str, field: str = "model_name_or_path") -> None:
    """Refuse a model without weights, whose turn may come hours from now; no tensor is read.

    Args:
        name: A folder, or a name on the Hub.
        field: The option that `name` comes from, for messages.

    Raises:
        ValueError: There are no weights, they are a pickle, a part of them is missing, or a file is cut off.
    """
    folder = Path(name)
    if not folder.is_dir():
        if looks_like_path(name):
            raise ValueError(f"{field}={name!r}: there is no such folder.")
        if not any(has_file(name, file) for file in SAFETENSORS):  # offline: in the cache
            check_weights_are_no_pickle(name, field)
            raise ValueError(
                f"{field}: {name}: neither the Hub nor its cache here has weights of it ({SAFETENSORS[0]}): "
                "look at its page, or at the network."
            )
        return
    found = next((folder / file for file in SAFETENSORS if (folder / file).is_file()), None)
    if found is None:
        check_weights_are_no_pickle(name, field)
        raise ValueError(
            f"{field}: {name} holds no weights ({SAFETENSORS[0]}): name the folder that save_pretrained "
            "wrote, such as a run's checkpoint."
        )
    for part in parts_of(found, field):
        if not part.is_file():
            raise ValueError(f"{field}: {name}: {part.name} is missing, which {found.name} names: copy it there.")
        try:
            with safe_open(part, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{field}: {name}: {part.name} is damaged or cut off ({error}): copy or download it again."
            ) from error
