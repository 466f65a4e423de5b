"""`ebft evaluate`: models and held-out data in, numbers with intervals, tables and plots out."""

from typing import Any

HELP = """\
usage: ebft evaluate --model_name_or_path MODEL [MODEL ...] --dataset_name DATA [--option value ...]
       ebft evaluate --config FILE.yaml [--option value ...]

Measures models side by side: the same documents and prompts, the same noise, one frozen feature network (the first
model's unless --feature_model_name_or_path names another). MODEL is a name on the Hugging Face Hub or a folder; DATA
is what `ebft train` takes. Every number comes with a 95 % interval, and on documents and code every pair of models
with its paired difference. An interrupted command goes on where it stopped when it is given again.

On documents (--metrics, by default all four):
  cross_entropy     nats per token and perplexity, over all tokens and over answer tokens
  feature_matching  unbiased feature-matching loss by completion length, from full-length rollouts; where several
                    documents share a prompt, also the variance of the references (the floor) and what is above it;
                    --kernels rbf energy characteristic ngram: the same under these too (docs/kernels.md)
  calibration       entropy of the k-th generated token, beside cross-entropy and entropy on the text at that place
  diversity         duplicate rate, distinct n-grams, self-BLEU (needs sacrebleu)

On tasks:
  --code_benchmark FILE ...   HumanEval, HumanEval+, MBPP, MBPP+, MultiPL-E, or JSON lines of `prompt` and `tests`;
                              generated code runs in a sandbox (docs/sandbox.md)
  --pass_at_k 1 4 16 --num_samples 16   unbiased pass@k of sampled completions, beside the greedy one
  --translation FILE          BLEU and chrF (sacrebleu); --best_of N: also the best of N
  --tasks NAME ...            tasks of lm-evaluation-harness (needs lm-eval)

examples:
  ebft evaluate --model_name_or_path runs/sft runs/ebft --dataset_name held_out.jsonl
  ebft evaluate --model_name_or_path runs/ebft --dataset_name held_out.jsonl --metrics cross_entropy calibration
  ebft evaluate --model_name_or_path runs/ebft --code_benchmark humaneval.jsonl --pass_at_k 1 4 16 --num_samples 16

Written to --output_dir (default: runs/evaluation-MODELS): results.json, results.csv, plots/*.png and *.svg, and
records/ with what was measured of each document, problem (samples and verdicts) and segment.

  ebft evaluate --help-all    every option, with its default
"""


def run(argv: list[str]) -> None:
    """Evaluate.

    Args:
        argv: The words after `ebft evaluate`.

    Raises:
        ValueError: An option, a model or the data cannot be used.
    """
    # The settings alone import neither torch nor transformers: a wrong one is told at once.
    from ebft.cli.parser import ArgumentParser, read_flags
    from ebft.evaluation.config import EvaluationConfig

    if "--help-all" in argv:
        ArgumentParser("evaluate", [EvaluationConfig]).print_help()
        return
    parser = ArgumentParser("evaluate", [EvaluationConfig])
    read_flags(parser, argv)
    config: Any = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    _evaluate(config)


def _evaluate(config: Any) -> None:
    from ebft.cli.quiet import quiet
    from ebft.evaluation import evaluate

    try:
        with quiet():
            evaluate(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
