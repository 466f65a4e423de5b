"""The experiment from the top down: a base model, the same documents with SFT and with EBFT, and the numbers."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM

from ..data import tokenize_documents
from ..evaluation import DocumentSettings
from ..evaluation.report import save
from ..evaluation.report import show as show_numbers
from ..evaluation.summary import summarise
from ..extras import require
from ..features import FeatureNetwork
from ..scratch import corpus
from ..scratch.folder import prepare_folder, quiet
from ..scratch.training import EBFT, SFT, new_model, train
from . import report
from .measuring import continuations, measure

MODELS = ("base", "sft", "ebft")
HELD_OUT = "held_out.jsonl"
SHOWN = ("cross_entropy/all", "feature_matching_loss")
ARTIFACTS = (*MODELS, HELD_OUT, "results.json", "results.csv", "curves.png")


@dataclass(frozen=True)
class Sizes:
    """How much of everything: about five minutes on two cores. A document has `document_length` tokens."""

    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    document_length: int = 256
    held_out_files: int = 96
    base_documents: int = 5000
    documents: int = 480
    num_generations: int = 8


SMOKE = Sizes(
    vocab_size=512,
    hidden_size=64,
    document_length=96,
    held_out_files=12,
    base_documents=64,
    documents=32,
    num_generations=2,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the quickstart from the command line."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    sizes = SMOKE if options.smoke else Sizes()
    chosen = {name: getattr(options, name) for name in ("base_documents", "documents")}
    sizes = replace(sizes, **{name: value for name, value in chosen.items() if value is not None})
    try:
        require("matplotlib", "plot", "the quickstart's plot")
        prepare_folder(options.output_dir, options.overwrite, ARTIFACTS, "quickstart")
        quiet()
        run(options.output_dir, sizes, options.seed, options.learning_rate)
    except ValueError as error:
        parser.error(str(error))


def run(folder: Path, sizes: Sizes, seed: int, learning_rate: float) -> None:
    """Train the three models, measure them, and show the results."""
    console = Console()

    console.rule("1. Text and tokenizer")
    files, held_out_files = corpus.hold_out(corpus.source_files(), sizes.held_out_files)
    tokenizer = corpus.train_tokenizer(map(corpus.read, files), sizes.vocab_size)
    length = sizes.document_length
    documents = corpus.training_documents(files, tokenizer, length, seed)
    held_out = corpus.held_out_documents(held_out_files, tokenizer, length)
    console.print(
        f"Python's standard library: {len(files)} files for training ({len(documents)} documents of at most {length} "
        f"tokens), {len(held_out_files)} held out ({len(held_out)} documents, one of each file that is long enough)."
    )
    held_out.to_json(folder / HELD_OUT)
    needed = sizes.base_documents + sizes.documents
    if needed > len(documents):
        raise ValueError(
            f"base_documents + documents = {needed}, but there are only {len(documents)}: lower one of the two"
        )

    console.rule("2. Training: base, then SFT and EBFT from it on the same new documents")
    first, more = documents.select(range(sizes.base_documents)), documents.select(range(sizes.base_documents, needed))
    tuned: dict[str, Any] = {"learning_rate": learning_rate, "gradient_accumulation_steps": 4, "seed": seed}
    scratch = {"learning_rate": 3e-3, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "seed": seed}
    model = new_model(tokenizer, sizes.hidden_size, sizes.layers, seed)
    seconds = {
        "base": train(model, tokenizer, first, folder / "base", SFT, **scratch),
        "sft": train(folder / "base", tokenizer, more, folder / "sft", SFT, **tuned),
        "ebft": train(folder / "base", tokenizer, more, folder / "ebft", EBFT, **tuned),
    }

    console.rule("3. Held-out measurements")
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in MODELS}
    phi = FeatureNetwork(models["base"])  # one fixed feature network for all
    tests = list(tokenize_documents(held_out, tokenizer, max_length=length))
    settings = DocumentSettings(("cross_entropy", "feature_matching"), num_generations=sizes.num_generations)
    rows = summarise(measure(models, phi, tests, settings), settings.axes)
    written = continuations(models, tokenizer, tests[:2], temperature=0.6)

    console.rule("4. Results")
    about = {"sizes": asdict(sizes), "seed": seed, "learning_rate": learning_rate, "training_seconds": seconds}
    about["files"] = {"training": [*map(str, files)], "held_out": [*map(str, held_out_files)]}
    save(folder, rows, {**about, "continuations": written})
    report.plot(folder, rows)
    show(console, folder, rows, written, seconds, sizes, len(tests))


def show(
    console: Console, folder: Path, rows, written, seconds: dict[str, float], sizes: Sizes, held_out: int
) -> None:
    """Print everything, and what it does and does not say."""
    report.show_continuations(console, written)
    rows = [row for row in rows if row["measure"] in SHOWN]
    show_numbers(console, rows, list(MODELS), f"{held_out} held-out documents, 95 % intervals")
    pairs = list(dict.fromkeys(row["model"] for row in rows if row["model"] not in MODELS))
    show_numbers(console, rows, pairs, "Paired differences (below 0: the first is better)")
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(
        f"Training took: {times} ({sizes.base_documents} documents for base, {sizes.documents} more for each of the "
        f"others). Plot, numbers and models: {folder}/curves.png, results.json, results.csv, {', '.join(MODELS)}.\n"
        f"Go on from there: ebft train --model_name_or_path {folder}/base --dataset_name my.jsonl --max_length 512\n"
        f"Measure more: ebft evaluate --model_name_or_path {folder}/sft {folder}/ebft --dataset_name "
        f"{folder}/{HELD_OUT}\n"
    )
    console.print(
        "One seed of one small model: the intervals say how much a number depends on which documents were held out "
        "and nothing about another seed, learning rate, model or text, so this shows that everything works and what "
        "it costs, not which method is better."
    )


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ebft.quickstart", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart_output"), help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart in output_dir")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and rollouts; default: %(default)s")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of SFT and of EBFT; default: %(default)s")
    parser.add_argument("--base_documents", type=int, help=f"to train base on; default: {Sizes.base_documents}")
    parser.add_argument("--documents", type=int, help=f"for SFT and for EBFT; default: {Sizes.documents}")
    parser.add_argument(
        "--smoke", action="store_true", help="a version of seconds that only shows that all parts work"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
