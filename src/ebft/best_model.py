"""Which metric chooses the best model, and whether more of it is better."""

import difflib
from typing import Any

from .metrics import COMPLETION_MEANS, MEANS

# Of metrics whose name is, or ends in, one of these; of all others more is better.
LOWER_IS_BETTER = (
    *("loss", "loss/all", "loss/answer", "kl", "rewards/diversity/mean", "rewards/diversity_unwhitened/mean"),
    *("frac_reward_zero_std", "completions/duplicate_rate", "completions/clipped_ratio", "runtime"),
)
NEITHER_IS_BETTER = ("entropy", "reward_std", "completions/mean_length")


def decide_direction(args: Any) -> None:
    """Set `greater_is_better` where it is left open; transformers knows no more than the ending `loss`.

    Raises:
        ValueError: Neither more nor less of `metric_for_best_model` is better by itself.
    """
    metric = args.metric_for_best_model
    if metric is None or args.greater_is_better is not None:
        return
    if _is_one_of(metric, NEITHER_IS_BETTER):
        raise ValueError(
            f"metric_for_best_model='{metric}': neither more nor less of it is better as such: set greater_is_better."
        )
    args.greater_is_better = not _is_one_of(metric, LOWER_IS_BETTER)


def _is_one_of(metric: str, names: tuple[str, ...]) -> bool:
    return metric in names or metric.endswith(tuple(f"_{name}" for name in names))


def check_metric(args: Any, eval_dataset: Any, has_own_metrics: bool) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will have, before anything is trained.

    Args:
        args: An `EBFTConfig`.
        eval_dataset: As given to the trainer; of a dict, each name is part of its metrics' names.
        has_own_metrics: Whether a function of the user's adds metrics, which may be called anything.

    Raises:
        ValueError: Names the nearest metric.
    """
    metric = args.metric_for_best_model
    if metric is None or eval_dataset is None or has_own_metrics:
        return
    names = [*MEANS, "loss", "reward_snr"]
    names = [name for name in names if args.rollout == "completion" or name not in COMPLETION_MEANS]
    names = [name for name in names if (args.beta and args.rl_coef) or name != "kl"]
    prefixes = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    known = [f"{prefix}{name}" for prefix in prefixes for name in names]
    wanted = metric if metric.startswith("eval_") else f"eval_{metric}"
    if wanted not in known:
        nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"metric_for_best_model='{metric}' is no metric of an evaluation: did you mean {nearest}? "
            f"(All: {', '.join(known)}.)"
        )
