"""`ebft compare`: methods, seeds and a small grid for each from one start; tables with intervals over seeds."""

from typing import Any

HELP = """\
usage: ebft compare --config FILE.yaml [--option value ...]

Trains every method with every setting of its grid and every seed, from the same model, on the same documents, for the
same number of documents (`documents`) or the same measured time (`train_seconds`); measures each run at equal parts of
its training on validation data, chooses each method's setting there, and reports the chosen ones on test data: means
with 95 % intervals over seeds, and paired differences. All grids have the same number of settings.

  model_name_or_path: base               # what all start from
  dataset_name: train.jsonl
  documents: 3000                        # or train_seconds: 120
  seeds: [0, 1, 2]
  select: cross_entropy/answer           # what chooses, on validation data
  train: {max_length: 256}               # options of `ebft train` for all methods
  methods:                               # options of `ebft train` for each, and a grid
    sft: {grid: {learning_rate: [1e-5, 1e-4]}}
    rlvr: {reward: unit_tests, grid: {learning_rate: [1e-6, 1e-5]}}
    ebft: {ce_coef: 0.1, grid: {learning_rate: [1e-5, 1e-4]}}
  validation: {dataset_name: validation.jsonl, code_benchmark: [validation_problems.jsonl]}
  test: {dataset_name: test.jsonl, code_benchmark: [test_problems.jsonl]}      # options of `ebft evaluate`

A run that fails does not stop the others. The same command goes on where it stopped, and tries failed runs again;
several commands in one output_dir share the work.

  --workers 2       runs at a time
  --output_dir DIR  default: runs/compare-DATA

Written there: results.parquet and .csv (every number), summary.csv (means over seeds), paired.csv (differences),
tables.md (both, to paste), chosen.yaml, and cells/*, each a run of `ebft train` with its log.txt, which `ebft report`
shows.

examples:
  python -m ebft.pocket qa_coding && ebft compare --config recipes/pocket/qa_coding.yaml --workers 2
  ebft compare --config recipes/pocket/qa_coding.yaml --seeds 0 --output_dir runs/one_seed

  ebft compare --help-all    every option
"""


def run(argv: list[str]) -> None:
    """Compare.

    Args:
        argv: The words after `ebft compare`.

    Raises:
        ValueError: An option or the data cannot be used.
        RuntimeError: Some runs failed.
    """
    # The settings alone import no torch: a wrong one is told at once.
    from ebft.cli.parser import ArgumentParser, read_flags
    from ebft.compare.config import CompareConfig

    parser = ArgumentParser("compare", [CompareConfig])
    if "--help-all" in argv:
        parser.print_help()
        return
    read_flags(parser, argv)
    config: Any = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    _compare(config)


def _compare(config: Any) -> None:
    from ebft.cli.quiet import quiet
    from ebft.compare.run import compare

    try:
        with quiet():
            compare(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
