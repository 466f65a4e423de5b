"""COMET scores of translations, from an environment of its own: it needs an older transformers and numpy than ours."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .translation import Segment

MODEL = "Unbabel/wmt22-comet-da"
# setuptools: an old torchmetrics imports pkg_resources, which newer ones lack.
REQUIREMENTS = ("unbabel-comet>=2.2", "transformers<5", "numpy<2", "setuptools<81")
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
        RuntimeError: Something else is there, or pip fails; with its last lines, and nothing is left of it.
    """
    folder = folder or environment_folder()
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and (folder.is_file() or any(folder.iterdir())):
        raise RuntimeError(f"COMET's environment {folder}: something else is there; name another folder.")
    for command in (
        [python, "-m", "venv", "--clear", str(folder)],
        [str(_python_of(folder)), "-m", "pip", "install", *REQUIREMENTS],  # its progress is shown
    ):
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)  # half of it would look like all of it
            raise RuntimeError(f"COMET's environment {folder}: `{' '.join(command)}` failed:\n{_tail(done.stderr)}")
    return folder


def check_environment(folder: Path | None = None) -> Path:
    """The environment's Python, in which COMET is found to import.

    Raises:
        ValueError: There is no such environment, or it is broken.
    """
    folder = folder or environment_folder()
    python = _python_of(folder)
    if not python.exists():
        raise ValueError(f"comet: it has no environment at {folder}: {_HOW}.")
    try:
        subprocess.run([str(python), "-I", "-c", "import comet"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        found = _tail(getattr(error, "stderr", None) or str(error))
        raise ValueError(f"comet: its environment {folder} does not work: {_HOW}.\n{found}") from error
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
        ValueError: The numbers do not match.
        RuntimeError: There is no such environment (`check_environment` tells earlier), or COMET fails; its last lines.
    """
    if len(segments) != len(hypotheses):
        raise ValueError(f"hypotheses: {len(hypotheses)} for {len(segments)} segments; give one for each.")
    folder = folder or environment_folder()
    python = _python_of(folder)
    pairs = zip(segments, hypotheses, strict=True)
    rows = [{"src": segment.source, "mt": text, "ref": segment.references[0]} for segment, text in pairs]
    lines = [json.dumps(row) for row in ({"model": model, "batch_size": batch_size, "gpus": gpus}, *rows)]
    with tempfile.TemporaryDirectory() as scratch:
        scores = Path(scratch) / "scores.json"
        # -I: neither our PYTHONPATH nor this folder, in which `comet` would be this file.
        command = [str(python), "-I", str(_WORKER), str(scores)]
        try:
            done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(f"COMET has no environment at {folder}: {_HOW}.") from error
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
    parser = argparse.ArgumentParser("python -m ebft.evaluation.comet", description="Make COMET's environment.")
    parser.add_argument("--folder", type=Path, default=environment_folder(), help="where (default: %(default)s)")
    print(make_environment(parser.parse_args().folder))
