"""What stands in for downloads: a package called comet in a Python of its own, and a task of lm-evaluation-harness."""

import json
import venv
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


def own_task(folder: Path) -> Path:
    """The YAML of a task with three examples."""
    (folder / "rows.json").write_text(json.dumps(TASK_ROWS))
    (folder / "ours.yaml").write_text(TASK.format(data=folder / "rows.json"))
    return folder / "ours.yaml"
