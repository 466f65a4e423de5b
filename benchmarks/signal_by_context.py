"""Where EBFT's gradient has signal: `python -m benchmarks.signal_by_context --model_name_or_path M ...`.

A context is a document cut behind one block. At the same weights, gradients of it with other rollouts each time give
the length of its mean gradient and its noise; contexts are sorted by how probable the model finds what really comes.
Shares are of sums over contexts: what gradients of different contexts have in common, which an update's signal has as
well, is not in them. Options that are not its own are those of `ebft train`.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.gradient_signal import between, gradients
from ebft import pretrained
from ebft.cli.arguments import parse
from ebft.data import load_documents, tokenize_documents

ROUNDING = 1e-16  # of squared lengths of gradients: rollouts that are all the same leave something like 1e-36
Context = dict[str, list[int]]
# One context per update, and nothing but what its rollouts say.
OF_ONE = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--ce_coef", "0"]


def contexts_of(model: str, words: list[str], count: int) -> list[Context]:
    """Documents cut behind a block of rollouts at a random place, with that block alone as their answer."""
    arguments = parse(words)
    settings, tokenizer = arguments.training, pretrained.load_tokenizer(model)
    rows = load_documents(arguments.data.dataset_name)
    documents: Any = tokenize_documents(rows, tokenizer, max_length=int(settings.max_length or 0))
    length, found, rng = settings.completion_length, [], random.Random(settings.seed)
    for index in rng.sample(range(len(documents)), len(documents)):
        ids, mask = documents[index]["input_ids"], documents[index]["completion_mask"]
        places = range(max(settings.context_length, mask.index(1)), len(ids) - length + 1, settings.stride)
        if len(found) < count and places:
            end = rng.choice(places) + length
            found.append({"input_ids": ids[:end], "completion_mask": [0] * (end - length) + [1] * length})
    return found


@torch.no_grad()
def log_prob(model: PreTrainedModel, context: Context) -> float:
    """Log-prob of the block that really comes, in nats."""
    ids = torch.tensor([context["input_ids"]])
    logits = model(ids).logits[0, :-1].float().log_softmax(-1)
    tokens = logits.gather(-1, ids[0, 1:, None])[:, 0]
    return float(tokens[-sum(context["completion_mask"]) :].sum())


def measure(words: list[str], context: Context, updates: int) -> dict[str, float]:
    """Squared length of one context's mean gradient, its noise, and the share of updates without a gradient."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.jsonl"
        path.write_text(json.dumps(context) + "\n", encoding="utf-8")
        found = gradients([*words, *OF_ONE, "--dataset_name", str(path)], updates, again=True).double()
    own = found @ found.T
    own[own.abs() < ROUNDING] = 0.0
    signal = float(between(own))
    without = float((own.diagonal() == 0).double().mean())
    return {"signal": signal, "noise": float(own.diagonal().mean()) - signal, "without": without}


def by_probability(rows: Sequence[dict[str, float]], bins: int) -> list[dict[str, float]]:
    """Means over contexts, in bins of equal size from the most to the least probable reference."""
    ordered, found = sorted(rows, key=lambda row: -row["log_prob"]), []
    for start, end in pairwise(len(ordered) * i // bins for i in range(bins + 1)):
        members = ordered[start:end]
        mean = {name: sum(row[name] for row in members) / len(members) for name in members[0]}
        mean["ratio"] = mean["signal"] / mean["noise"] if mean["noise"] else 0.0
        found.append(mean | {"contexts": len(members)})
    return found


def table(found: Sequence[dict[str, float]]) -> Table:
    """What was measured, to look at."""
    shown = Table(title="EBFT's gradient by context, from probable to improbable references", box=box.SIMPLE_HEAD)
    heads = (
        "contexts",
        "log-prob of\nreference",
        "no\ngradient",
        "share of\nsignal",
        "share of\nnoise",
        "signal /\nnoise",
    )
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    whole = {name: sum(row[name] * row["contexts"] for row in found) or 1.0 for name in ("signal", "noise")}
    for row in found:
        shares = [f"{row[name] * row['contexts'] / whole[name]:.0%}" for name in ("signal", "noise")]
        numbers = f"{row['log_prob']:.2f}", f"{row['without']:.0%}", *shares, f"{row['ratio']:.2g}"
        shown.add_row(str(row["contexts"]), *numbers)
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure, show, and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal_by_context", description=__doc__)
    parser.add_argument("--contexts", type=int, default=64, help="how many, of documents of their own")
    parser.add_argument("--updates", type=int, default=24, help="gradients of each; at least 4")
    parser.add_argument("--bins", type=int, default=4, help="lines of the table")
    parser.add_argument("--json", type=Path, help="also write the numbers of each context to this file")
    own, words = parser.parse_known_args(argv)
    if own.updates < 4 or not 1 <= own.bins <= own.contexts:
        parser.error("give at least 4 updates, and from 1 bin to as many as there are contexts")
    name = str(parse(words).model.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(name)
    rows = []
    for context in tqdm(contexts_of(name, words, own.contexts), desc="contexts"):
        rows.append({"log_prob": log_prob(model, context), **measure(words, context, own.updates)})
    Console().print(table(by_probability(rows, min(own.bins, len(rows)))))
    if own.json:
        own.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
