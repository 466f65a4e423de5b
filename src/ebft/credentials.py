"""Tokens and passwords among settings: refused where they would be written down, hidden where they are shown.

Imports nothing but the standard library: the command line asks before anything else is loaded.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

ENDINGS = ("_token", "api_key", "apikey", "password", "secret", "secret_key", "access_key")
# Of a tokenizer, and no secrets.
SPECIAL_TOKENS = {f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
HIDDEN = "(hidden)"


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, such as `hub_token`, `token` or `WANDB_API_KEY`."""
    name = name.lower()
    return name not in SPECIAL_TOKENS and (name == "token" or name.endswith(ENDINGS))


def check_no_credentials(settings: Mapping[str, Any]) -> None:
    """Refuse settings whose values would put a secret into the files of a run and before its loggers.

    Raises:
        ValueError: Names the setting, not its value.
    """
    for place, name, value in _texts(settings):
        if is_secret(name):
            raise ValueError(
                f"{place}: a token or password would be written into files and sent to loggers: set it in the "
                "environment (HF_TOKEN), or log in with `hf auth login`, and remove it here"
            )
        if PASSWORD_IN_URL.search(value):
            raise ValueError(
                f"{place}: the password in its URL would be written into files and sent to loggers: keep it in "
                "~/.netrc, and remove it here"
            )


def hidden(value: Any) -> Any:
    """The same settings, or one value of them, without what is secret: to be shown."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if v and is_secret(str(k)) else hidden(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(inner) for inner in value]
    return PASSWORD_IN_URL.sub("", value) if isinstance(value, str) else value


def place_of(error: Exception) -> str:
    """Where and why a text is no YAML (of a `yaml.YAMLError`), without the line itself, in which a token may stand."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f":{mark.line + 1}: not valid YAML: {problem}" if mark and problem else ": not valid YAML"


def _texts(value: Any, place: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Every text with the path to it and the name it stands under."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}".lstrip("."), str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, place, name)
    elif isinstance(value, str):
        yield place, name, value
