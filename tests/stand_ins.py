"""What stands in for downloads: packages called comet and lm_eval, and a task of lm-evaluation-harness."""

import json
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

COMET = """
import types

def download_model(name):
    if name != "known":
        raise KeyError(f"Model '{name}' not supported by COMET.")
    return "checkpoint"

class Model:
    def predict(self, data, batch_size, gpus):
        print("what a progress bar prints", batch_size, gpus)
        scores = [len(row["src"]) + (row["mt"] == row["ref"]) / 2 for row in data]
        return types.SimpleNamespace(scores=scores[:-1] if batch_size == 99 else scores)

def load_from_checkpoint(path):
    assert path == "checkpoint"
    return Model()
"""

# As much of lm-evaluation-harness 0.4.13 as finds and loads the tasks of a folder.
HARNESS = """
import fnmatch, os, types
from pathlib import Path
import yaml

class TaskManager:
    def __init__(self, include_path=None):
        self.task_index = {}
        for path in sorted(Path(include_path).glob("*.yaml")) if include_path else ():
            config = yaml.safe_load(path.read_text())
            self.task_index[config.get("task") if "group" not in config else config["group"]] = types.SimpleNamespace(
                cfg=config
            )
        self.all_tasks = sorted(self.task_index)
        self.all_subtasks = [name for name in self.all_tasks if "group" not in self.task_index[name].cfg]

    def match_tasks(self, patterns):
        return sorted({name for pattern in patterns for name in fnmatch.filter(self.all_tasks, pattern)})

    def load(self, tasks):
        known = self.task_index
        configs = [known[name].cfg if name in known else yaml.safe_load(open(name)) for name in tasks]
        for config in configs:
            os.stat(config["dataset_kwargs"]["data_files"]["test"])
        loaded = [types.SimpleNamespace(UNSAFE_CODE="unsafe_code" in config) for config in configs]
        return {"tasks": {config["task"]: task for config, task in zip(configs, loaded)}}
"""

TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

TASK_ROWS = [{"context": f"the {w}", "choices": [" dog", " fox"], "label": 0} for w in ("quick", "lazy", "brown")]


def comet_stand_in(folder: Path) -> Path:
    """An environment whose `comet` knows one model; a score is the source's length, and .5 for the very reference."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "comet.py").write_text(COMET)
    return folder


@contextmanager
def harness_or_stand_in(folder: Path) -> Iterator[None]:
    """Where lm-evaluation-harness is not installed, a package that finds and loads tasks in its place."""
    if find_spec("lm_eval") is not None:
        yield
        return
    (folder / "lm_eval" / "tasks").mkdir(parents=True)
    (folder / "lm_eval" / "__init__.py").touch()
    (folder / "lm_eval" / "tasks" / "__init__.py").write_text(HARNESS)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in ("lm_eval", "lm_eval.tasks"):
            sys.modules.pop(name, None)


def own_task(folder: Path) -> Path:
    """The YAML of a task with three examples."""
    (folder / "rows.json").write_text(json.dumps(TASK_ROWS))
    (folder / "ours.yaml").write_text(TASK.format(data=folder / "rows.json"))
    return folder / "ours.yaml"
