"""The public's continuous integration: pinned actions, the Makefile's own targets, nothing private."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOSTS = {"download.pytorch.org"}
TARGETS = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_both_are_there():
    assert [path.name for path in WORKFLOWS] == ["release.yml", "test.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_commands_are_make_targets(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
            continue
        command, target, *_ = step["run"].split()
        assert command == "make" and target in TARGETS
    for line in path.read_text().splitlines():
        assert "uses:" not in line or re.search(r"@[0-9a-f]{40} # v\d", line), "say which version a pin is"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_nothing_private(path):
    text = path.read_text()
    assert set(re.findall(r"https?://([^/\s\"]+)", text)) <= HOSTS
    assert not re.search(r"secrets\.|/home/|/root|self-hosted", text)


def test_versions_of_python_and_of_dependencies():
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    classifiers = [line.rsplit(" :: ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert matrix["python"] == classifiers and PROJECT["requires-python"] == f">={classifiers[0]}"
    kinds = [*matrix["constraints"], *(entry["constraints"] for entry in matrix["include"])]
    assert kinds == ["constraints.txt", "constraints-lowest.txt", "/dev/null"]


def test_lowest_versions_are_the_projects():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    bounds = (re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in PROJECT["dependencies"])
    assert lines == [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]
