"""One HTML file that needs nothing else: styles, scripts, data and plotly within it."""

import base64
import gzip
import hashlib
import html
import json
import math
from importlib.resources import files
from typing import Any

SCRIPTS = ("page.js", "figures.js", "viewer.js")


def plotly_source() -> str:
    """Plotly's JavaScript, of the version that is installed.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report draws its figures with plotly, which is not installed") from error
    return get_plotlyjs()


def page(title: str, data: dict[str, Any], rollouts: list[Any]) -> str:
    """The whole file, in ASCII.

    Plotly's code is most of it. It is packed, which makes the file three times smaller, and unpacked and run only
    after the rest can be used. The policy in the head lets nothing run but the scripts named by their hashes, and no
    address be asked for anything: text of a model stays text whatever is in it, even if this page had a mistake.

    Args:
        title: Of the page.
        data: What `page.js` and `figures.js` show.
        rollouts: One entry per step, which `viewer.js` reads when its step is chosen.
    """
    assets = files("ebft.report") / "assets"
    scripts = [(assets / name).read_text(encoding="ascii") for name in SCRIPTS]
    plotly = plotly_source()
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in [*scripts, plotly])
    blocks = [_data("data", data), *(_data(f"rollouts-{i}", step) for i, step in enumerate(rollouts))]
    packed = base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode()
    parts = {
        "TITLE": html.escape(title),
        "HASHES": hashes,
        "STYLE": (assets / "report.css").read_text(encoding="ascii"),
        "DATA": "\n".join(blocks),
        "PLOTLY": packed,
        "SCRIPTS": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    text = (assets / "page.html").read_text(encoding="ascii")
    # One pass over the template: a marker inside of a value is text like any other.
    pieces = text.split("%%")
    filled = [parts[piece] if index % 2 else piece for index, piece in enumerate(pieces)]
    return "".join(filled).encode("ascii", "xmlcharrefreplace").decode("ascii")


def encode(value: Any) -> str:
    """JSON for a <script> element: nothing in it can end the element or be taken for markup.

    Non-ASCII text becomes escapes, U+2028, U+2029 and lone surrogates included; numbers that JSON has not become null.
    """
    text = json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(name: str, value: Any) -> str:
    return f'<script type="application/json" id="{name}">{encode(value)}</script>'


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
