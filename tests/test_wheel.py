"""The wheel that `make wheel` built: all of the package is in it, and it works in an environment without the clone."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import ebft
from tiny import byte_bpe_tokenizer
from training import small_model

ROOT = Path(__file__).resolve().parents[1]
WHEELS = sorted((ROOT / os.environ.get("EBFT_WHEEL", "nowhere")).glob("ebft-*.whl"))

pytestmark = pytest.mark.skipif(not WHEELS, reason="`make wheel` builds it")


def test_the_whole_package_is_in_it():
    (wheel,) = WHEELS
    source = ROOT / "src"
    files = {str(path.relative_to(source)) for path in (source / "ebft").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"ebft/py.typed", "ebft/report/assets/page.html"} <= files
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files


def test_its_version():
    (wheel,) = WHEELS
    assert wheel.name.split("-")[1] == (os.environ.get("EBFT_VERSION") or ebft.__version__)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Runs a command of the installed wheel, in a folder with a model and documents, and returns what it printed.

    The environment has the wheel, and sees all other packages where the tests have them.
    """
    folder = tmp_path_factory.mktemp("outside")
    environment, work = folder / "environment", folder / "work"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(WHEELS[0]),
    ]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    work.mkdir()
    small_model(dtype=torch.float32).save_pretrained(work / "model")
    byte_bpe_tokenizer().save_pretrained(work / "model")
    rows = [{"text": f"The number {i} is followed by the number {i + 1}, which is larger."} for i in range(6)]
    (work / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words: str) -> str:
        command = [str(environment / "bin" / words[0]), *words[1:]]
        result = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run.folder = work
    return run


def test_it_is_the_wheel_that_is_used(outside):
    assert str(outside.folder.parent / "environment") in outside("python", "-c", "import ebft; print(ebft.__file__)")
    assert outside("ebft", "--version").strip() == ebft.__version__
    assert "usage: ebft VERB" in outside("ebft", "--help")


def test_plan_train_and_report(outside):
    words = ["--model_name_or_path", "model", "--dataset_name", "my.jsonl", "--max_length", "48", "--use_cpu"]
    assert "blocks" in outside("ebft", "plan", *words)
    outside("ebft", "train", *words, "--max_steps", "2", "--rollout_save_steps", "1")
    run = outside.folder / "runs" / "model-my"
    assert {"model.safetensors", "metrics.jsonl", "resolved_config.yaml", "README.md"} <= set(os.listdir(run))
    pytest.importorskip("plotly")
    outside("ebft", "report", str(run))
    assert "<script>" in (run / "report.html").read_text()
