"""Every shipped recipe is understood by the command it is for; no data or model is needed."""

from pathlib import Path

import pytest
import yaml

from ebft.compare.cells import cells_of
from ebft.compare.check import check_options
from ebft.compare.config import CompareConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
POCKET = sorted((RECIPES / "pocket").glob("*.yaml"))


@pytest.mark.parametrize("path", POCKET, ids=lambda path: path.stem)
def test_recipe_of_a_comparison(path, tmp_path):
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
    assert {path.stem for path in POCKET} == {"ablations", *tasks, *(f"{task}_small" for task in tasks)}
