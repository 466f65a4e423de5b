"""README.md beside a saved model: what it was made of, how, and what was measured of it.

python -m ebft.model_card MODEL RESULTS adds what an `ebft evaluate` that wrote RESULTS (a results.json) says of MODEL.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .artifacts import last_complete_checkpoint

TAGS = ["ebft", "energy-based-fine-tuning"]
TASK = {"type": "text-generation", "name": "Text Generation"}
OF_THE_CLOCK = ("_runtime", "_per_second", "_preparation_time")

CARD = """---
{metadata}---

# {name}

Fine-tuned from {base} with Energy-Based Fine-Tuning (EBFT): the features of the model's own rollouts are matched to
those of real completions ([arXiv 2603.12248](https://arxiv.org/abs/2603.12248)). Without `ebft`, in {library}:

```python
{snippet}
```

- Feature network: {feature_network}
- Kernel: {kernel}
- Training data: {dataset}

| last metrics of the run | |
|---|---|
{metrics}

Settings (`resolved_config.yaml`):

```yaml
{settings}```
"""


def write_model_card(
    folder: Path, *, name, base, dataset, feature_network, kernel, history, settings, adapter, hub_name=None, tags=()
) -> None:
    """Write README.md beside a saved model.

    Args:
        folder: Where.
        name: Of the model; the folder's if None.
        base: What was fine-tuned; None for a model built in code.
        dataset: What on, or None.
        feature_network: Its record, or None.
        kernel: Its record, or None where no rollouts were scored.
        history: The trainer's log history: the last training and the last evaluation metrics are shown.
        settings: All settings of the run.
        adapter: Whether an adapter is saved in place of a whole model.
        hub_name: What the model is called on the Hub, if it is pushed there.
        tags: For the Hub, beside ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained, evaluated = (_last(history, key) for key in ("learning_rate", "eval_loss"))
    rows = "\n".join(f"| {k} | {v:.6g} |" for k, v in (trained | evaluated).items() if isinstance(v, (int, float)))
    without = "(rl_coef is 0)" if kernel is None else "(n-grams of token ids)"
    network, kernel = feature_network or {"none": without}, kernel or {"none": without}
    network, kernel = (", ".join(f"{k} {v}" for k, v in r.items() if v is not None) for r in (network, kernel))
    holds_model = any((folder / file).exists() for file in ("config.json", "adapter_config.json"))
    path = folder if holds_model else last_complete_checkpoint(folder) or folder
    loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    metadata: dict[str, Any] = {"library_name": loader[0], "pipeline_tag": TASK["type"]}
    metadata["tags"] = list(dict.fromkeys([*TAGS, *tags]))
    metadata |= {"base_model": base} if is_on_hub(base) else {}
    metadata |= {"datasets": [dataset]} if is_on_hub(dataset) else {}
    measures = {k: v for k, v in evaluated.items() if k.startswith("eval_") and not k.endswith(OF_THE_CLOCK)}
    if measures:
        where = settings.get("eval_dataset_name") or dataset or "not recorded"
        results = [_result(str(where), [(k.removeprefix("eval_"), v) for k, v in measures.items()])]
        metadata["model-index"] = [{"name": name or folder.name, "results": results}]
    text = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        library=loader[0],
        snippet=f'from {loader[0]} import {loader[1]}\nmodel = {loader[1]}.from_pretrained("{hub_name or path}")',
        name=name or folder.name,
        base=base or "a model built in code",
        dataset=dataset or "not recorded",
        feature_network=network,
        kernel=kernel,
        metrics=rows,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _last(history: Iterable[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((record for record in reversed(list(history)) if key in record), {})


def is_on_hub(name: str | None) -> bool:
    """Whether a name can be one on the Hub, which takes no other as a card's base model or data."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _result(dataset: str, measures: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """One entry of a card's `model-index`."""
    metrics = [{"type": name, "name": name, "value": value} for name, value in measures]
    return {"task": TASK, "dataset": {"name": dataset, "type": dataset}, "metrics": metrics}


def add_results(folder: str | Path, results: str | Path) -> int:
    """Add what `ebft evaluate` measured of a model to the metadata of its card, in the place of the run's own results.

    Args:
        folder: The model's, with its README.md.
        results: The results.json of an evaluation of that folder.

    Returns:
        How many numbers were added.

    Raises:
        ValueError: There is no card, no results, or they are not of this model.
    """
    path = Path(folder) / "README.md"
    try:
        _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
        about = json.loads(Path(results).read_text(encoding="utf-8"))
        models, rows, config = about["models"], about["results"], about["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, {results}: give a model with a card, and results of an evaluation ({error})."
        ) from error
    name = next((name for name, where in models.items() if Path(where).resolve() == Path(folder).resolve()), None)
    if name is None:
        raise ValueError(f"{results}: of {', '.join(models.values())}, not of {folder}.")
    found = [
        (row["measure"] if row["length"] is None else f"{row['measure']}@{row['length']}", row["mean"])
        for row in rows
        if row["model"] == name and row["mean"] is not None
    ]
    sources = (config.get("dataset_name"), config.get("translation"), *config.get("code_benchmark", ()))
    where = ", ".join(str(source) for source in (*sources, *config.get("tasks", ())) if source)
    metadata = yaml.safe_load(head)
    metadata["model-index"] = [{"name": name, "results": [_result(where, found)]}]
    path.write_text(
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}", encoding="utf-8"
    )
    return len(found)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{add_results(*sys.argv[1:])} numbers are in {sys.argv[1]}/README.md")
    except ValueError as error:
        sys.exit(f"error: {error}")
