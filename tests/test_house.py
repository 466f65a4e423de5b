"""The rules of the house: public names, direction of imports, what every file looks like."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import ebft

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ebft"
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]

PURE = {"blocks": set(), "rewards": set(), "advantages": set(), "losses": set(), "kernels": {"rewards"}}
# From the top down: a module may import those of its own and later rows. The others only have to leave trainer alone.
ROWS = [{"cli"}, {"trainer"}, {"rollout", "features", "logprobs"}, {"attention"}, {"blocks"}]
MAY_IMPORT_TRAINER = {"cli", "scratch", "__init__"}


def name_of(path: Path) -> str:
    """The first component below ebft: `cli` for cli/train.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, at any depth of its code, as first components below ebft."""
    package = ("ebft", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            home = ".".join([*base, node.module] if node.module else base)
            names = [f"{home}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ebft.")}
    return found & {name_of(module) for module in MODULES}


def test_public_interface_is_pinned():
    assert set(ebft.__all__) == {
        "BlockLayout",
        "EBFTConfig",
        "EBFTTrainer",
        "FeatureNetwork",
        "advantages",
        "block_log_probs",
        "document_and_block_log_probs",
        "rewards",
        "sample_blocks",
    }


@pytest.mark.parametrize("name", ebft.__all__)
def test_public_name_can_be_imported(name):
    value = getattr(ebft, name)
    assert value.__name__ in (name, f"ebft.{name}")
    assert name in dir(ebft)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="EBFTrainer"):
        _ = ebft.EBFTrainer  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_ebft_imports_no_torch():
    code = "import sys, ebft; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    name, imports = name_of(path), imports_of(path)
    if name in PURE:
        assert imports <= PURE[name]
    if name not in MAY_IMPORT_TRAINER:
        assert "trainer" not in imports - {name}
    for row, members in enumerate(ROWS):
        if name in members:
            above = set().union(*ROWS[:row])
            assert not imports & above, f"{name} imports {imports & above}, which stand above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_opens_with_a_docstring_and_is_ascii(path):
    text = path.read_bytes().decode("ascii")
    assert ast.get_docstring(ast.parse(text)), "the first line of a file says its one job"
    assert text.startswith(('"""', 'r"""'))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml"])
def test_document_is_ascii(name):
    assert (ROOT / name).read_bytes().isascii()


def test_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ebft.__version__


def test_constraints_cover_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {normalised(requirement) for requirement in wanted} - {"ebft"}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert names <= {normalised(pin) for pin in pins}
    assert "torch==2.13.0" in pins


def normalised(requirement: str) -> str:
    """The bare name of a requirement: `pyright[nodejs]>=1` is pyright."""
    return re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-")
