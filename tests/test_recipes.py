"""Every shipped recipe is understood by the command it is for, and names files that the pocket tasks have."""

from pathlib import Path

import pytest
import yaml

from ebft.compare.cells import cells_of
from ebft.compare.check import check_options
from ebft.compare.config import CompareConfig
from ebft.pocket import qa_coding, stdlib_code, translation
from ebft.pocket.files import write_rows
from tiny_models import tiny_model

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
POCKET = sorted((RECIPES / "pocket").glob("*.yaml"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the files of all tasks, smaller ones, and a model in the place of each base model."""
    folder = tmp_path_factory.mktemp("recipes")
    for module in (qa_coding, stdlib_code, translation):
        task = folder / "pocket" / module.__name__.split(".")[-1]
        task.mkdir(parents=True)
        for name, rows in module.make(module.SMOKE, 0).files.items():
            write_rows(task / f"{name}.jsonl", rows)
        for model in ("base", "warm"):
            tiny_model("qwen2", vocab_size=32).save_pretrained(task / model)
    return folder


@pytest.mark.parametrize("path", POCKET, ids=lambda path: path.stem)
def test_recipe_of_a_comparison(path, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tasks)
    config = CompareConfig(**yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path)})
    cells = cells_of(config)
    check_options(config, cells)
    assert len(config.seeds) >= 3
    for options in (config.validation, config.test, *config.more_tests.values()):
        held_out = [options.get("dataset_name"), options.get("translation"), *options.get("code_benchmark", [])]
        assert not {config.dataset_name, None} >= set(held_out)
        task = Path(config.model_name_or_path).parent
        assert all(name is None or Path(name).parent == task for name in held_out)


def test_there_are_recipes():
    tasks = ("qa_coding", "stdlib_code", "translation")
    one_factor = {"ablations", "ablations_warm", "kernels_and_networks"}
    assert {path.stem for path in POCKET} == one_factor | {*tasks, *(f"{task}_small" for task in tasks)}
