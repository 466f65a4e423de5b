"""COMET scores of translations, from an environment of its own: it needs an older transformers and numpy than ours."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .translation import Segment

MODEL = "Unbabel/wmt22-comet-da"
REQUIREMENTS = ("unbabel-comet>=2.2", "transformers<5", "numpy<2")
_WORKER = Path(__file__).with_name("comet_worker.py")
_HOW = "make it once with `python -m ebft.evaluation.comet` (several GB), or ebft.evaluation.comet.make_environment()"


def environment_folder() -> Path:
    """Where the environment is: ebft/comet in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebft" / "comet"


def make_environment(folder: Path | None = None, python: str = sys.executable) -> Path:
    """Make a virtual environment with unbabel-comet; downloads several GB.

    Args:
        folder: Where; by default `environment_folder()`.
        python: The interpreter to make it with.

    Returns:
        The folder.

    Raises:
        RuntimeError: The environment cannot be made, or pip fails; with its last lines.
    """
    folder = folder or environment_folder()
    for command in (
        [python, "-m", "venv", str(folder)],
        [str(_python_of(folder)), "-m", "pip", "install", *REQUIREMENTS],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"COMET's environment {folder}: `{' '.join(command)}` failed:\n{_tail(done.stderr)}")
    return folder


def check_environment(folder: Path | None = None) -> Path:
    """The environment's Python.

    Raises:
        ValueError: There is no such environment.
    """
    folder = folder or environment_folder()
    python = _python_of(folder)
    if not python.exists():
        raise ValueError(f"comet: it has no environment at {folder}: {_HOW}.")
    return python


def comet_scores(
    segments: Sequence[Segment],
    hypotheses: Sequence[str],
    *,
    model: str = MODEL,
    folder: Path | None = None,
    batch_size: int = 16,
    gpus: int = 0,
) -> list[float]:
    """COMET of each translation, against the first reference of its segment; their mean is the corpus' score.

    Args:
        segments: What was translated.
        hypotheses: One translation of each.
        model: Name on the Hub, or a checkpoint file.
        folder: COMET's environment; by default `environment_folder()`.
        batch_size: Segments per forward.
        gpus: How many to use.

    Raises:
        ValueError: The numbers do not match, or there is no such environment.
        RuntimeError: COMET fails in it; with its last lines.
    """
    if len(segments) != len(hypotheses):
        raise ValueError(f"hypotheses: {len(hypotheses)} for {len(segments)} segments; give one for each.")
    folder = folder or environment_folder()
    python = check_environment(folder)
    pairs = zip(segments, hypotheses, strict=True)
    rows = [{"src": segment.source, "mt": text, "ref": segment.references[0]} for segment, text in pairs]
    lines = [json.dumps(row) for row in ({"model": model, "batch_size": batch_size, "gpus": gpus}, *rows)]
    with tempfile.TemporaryDirectory() as scratch:
        scores = Path(scratch) / "scores.json"
        # -I: neither our PYTHONPATH nor this folder, in which `comet` would be this file.
        command = [str(python), "-I", str(_WORKER), str(scores)]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
        if done.returncode or not scores.exists():
            raise RuntimeError(f"COMET failed in {folder}; if it is not whole, {_HOW}.\n{_tail(done.stderr)}")
        values = json.loads(scores.read_text(encoding="utf-8"))
    if len(values) != len(segments):
        raise RuntimeError(f"COMET gave {len(values)} scores for {len(segments)} segments.")
    return values


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])


if __name__ == "__main__":
    print(make_environment())
