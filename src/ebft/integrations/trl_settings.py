"""What a TRL trainer makes of rewards: settings it must have here, and the rewards that its baseline needs."""

from typing import Any

from trl import GRPOConfig, RLOOConfig

# With these, a trainer's advantages are its rewards minus its baseline and nothing else.
PLAIN_ADVANTAGES = {
    "scale_rewards": "none",
    "multi_objective_aggregation": "sum_then_normalize",
    "normalize_advantages": False,
    "reward_clip_range": None,
}


def check_groups_stay_whole(args: Any) -> None:
    """Refuse configs of other trainers, and batches that would split groups.

    A reward function gets what its own process samples at a time: `per_device_train_batch_size` x
    `steps_per_generation` completions, of prompts that stand `num_generations` times after another. TRL itself only
    asks that groups be whole over all processes together.

    Raises:
        ValueError: Names the setting.
    """
    if not isinstance(args, GRPOConfig | RLOOConfig):
        raise ValueError(f"args={type(args).__name__}: pass the GRPOConfig or RLOOConfig of the trainer.")
    n: Any = args.num_generations
    if args.num_generations_eval not in (None, n):
        raise ValueError(
            f"num_generations_eval={args.num_generations_eval} beside num_generations={n}: TRL does not say which of "
            "the two a batch has; leave num_generations_eval out."
        )
    steps = args.steps_per_generation or 1
    at_a_time = {"per_device_train_batch_size x steps_per_generation": args.per_device_train_batch_size * steps}
    if args.eval_strategy != "no":
        at_a_time["per_device_eval_batch_size"] = args.per_device_eval_batch_size
    for name, size in at_a_time.items():
        if size % n:
            raise ValueError(
                f"{name} is {size}, no multiple of num_generations={n}: groups would be split over processes or "
                "batches, and this reward compares the completions of a group; change one of them."
            )


def check_leave_one_out(args: Any, diversity_coef: float) -> None:
    """Refuse what keeps a trainer's advantages from being those of the exact leave-one-out baseline.

    Raises:
        ValueError: Names the setting.
    """
    for name, plain in PLAIN_ADVANTAGES.items():
        value = getattr(args, name, plain)
        if value != plain:
            raise ValueError(
                f"{name}={value!r} makes other advantages than baseline='leave_one_out' stands for: set "
                f"{name}={plain!r}, or baseline='trainer'."
            )
    if args.num_generations == 2 and diversity_coef:
        raise ValueError(
            f"num_generations=2 with diversity_coef={diversity_coef}: both completions have the same diversity, which "
            "the trainer's baseline removes; set num_generations to 3 or more, diversity_coef=0, or "
            "baseline='trainer' (which trains without diversity as well)."
        )


def leave_one_out_factors(num_generations: int, *, rloo: bool) -> tuple[float, float]:
    """Factors of the alignment and of the diversity term with which a trainer's own baseline becomes leave-one-out's.

    With n completions, alignments a, diversities d and their means over the group a' and d', the advantages of the
    exact leave-one-out baseline (App. E, eq 94) are, for n > 2,

        alignment_coef n / (n - 1) (a_j - a')  -  diversity_coef n / (n - 2) (d_j - d'),

    which sum to zero, so that they are centred rewards. RLOO's advantages are n / (n - 1) (r_j - r'), those of GRPO
    without scaling r_j - r'. Hence the factors 1 and (n - 1) / (n - 2), and for GRPO n / (n - 1) times both.
    For n = 2 both diversities are the same number, which any centring removes: no factor brings it back.

    Args:
        num_generations: n, at least 2.
        rloo: Whether the baseline is the mean of the others, or else of all.
    """
    n = num_generations
    scale = 1.0 if rloo else n / (n - 1)
    return scale, scale * (n - 1) / (n - 2) if n > 2 else 0.0
