"""Advantage estimators: leave-one-out (exact), rloo, group_norm, none; and the reward-to-go of per-token rewards.

Shapes: rewards and advantages are [..., n], the group of n rollouts of one context last: [B, K, N], or [B, K, G, N]
where every token has its own reward (B documents, K blocks, N rollouts, G generated tokens).

Per-token rewards: r = Rewards(*map(reward_to_go, r)) first, then any estimator, then .mT for [B, K, N, G].
"""

from collections.abc import Callable

from torch import Tensor


def leave_one_out(
    rewards: tuple[Tensor, Tensor, Tensor], *, alignment_coef: float = 1.0, diversity_coef: float = 1.0
) -> Tensor:
    """Reward minus the exact leave-one-out baseline (App. E, eq 94), [..., n].

    The baseline of sample j is the mean over i != j of sample i's reward *recomputed without sample j*. With the
    alignment and diversity terms a and d (factors 2 included) that is

        b_j = alignment_coef (sum a - a_j) / (n - 1)  -  diversity_coef (sum d - 2 d_j) / (n - 2)

    since taking j away removes its n - 1 dots from the sum over the others, and a diversity is normalised by one
    sample less; for n = 2 nobody is left to compare with and the diversity part is 0. b_j does not depend on sample
    j, so the policy gradient stays unbiased. (Whitening mixes the samples: there the independence is approximate.)
    Unbiased does not say of small variance: for n = 2 the baseline lacks the diversity that offsets the alignment.

    Args:
        rewards: total, alignment, diversity (a `rewards.Rewards`), each [..., n].
        alignment_coef: the weight of alignment within total.
        diversity_coef: the weight of diversity within total.

    Raises:
        ValueError: if n < 2.
    """
    total, alignment, diversity = rewards
    n = _group_size(total, "leave_one_out")
    baseline = alignment_coef * _mean_of_others(alignment, n)
    if n > 2:
        baseline = baseline - diversity_coef * (diversity.sum(-1, keepdim=True) - 2 * diversity) / (n - 2)
    return total - baseline


def rloo(total: Tensor) -> Tensor:
    """Reward minus the mean reward of the other samples, [..., n].

    Exact for a reward that depends on its own sample alone, as the k1 estimate of the KL divergence does. The
    diversity term does not: there this is the gradient with diversity_coef (n - 2) / (n - 1) in place of
    diversity_coef, no diversity at all for n = 2.

    Raises:
        ValueError: if n < 2.
    """
    return total - _mean_of_others(total, _group_size(total, "rloo"))


def group_norm(total: Tensor, eps: float = 1e-4) -> Tensor:
    """Reward standardised within its group, (r - mean) / (std + eps), [..., n]; eps as in TRL's GRPO. Biased.

    Raises:
        ValueError: if n < 2.
    """
    _group_size(total, "group_norm")
    return (total - total.mean(-1, keepdim=True)) / (total.std(-1, keepdim=True) + eps)


def none(total: Tensor) -> Tensor:
    """The reward itself: no baseline, unbiased, any n."""
    return total


ON_TOTAL: dict[str, Callable[[Tensor], Tensor]] = {"rloo": rloo, "group_norm": group_norm, "none": none}
ADVANTAGE_ESTIMATORS = ("leave_one_out", *ON_TOTAL)


def estimate(
    name: str, rewards: tuple[Tensor, Tensor, Tensor], *, alignment_coef: float = 1.0, diversity_coef: float = 1.0
) -> Tensor:
    """The advantages, [..., n], that `advantage_estimator: name` stands for.

    Raises:
        ValueError: if the name is unknown or n is too small for it.
    """
    if name not in ADVANTAGE_ESTIMATORS:
        raise ValueError(f"advantage_estimator={name!r} is unknown: use one of {', '.join(ADVANTAGE_ESTIMATORS)}.")
    if name == "leave_one_out":
        return leave_one_out(rewards, alignment_coef=alignment_coef, diversity_coef=diversity_coef)
    return ON_TOTAL[name](rewards[0])


def reward_to_go(rewards_BKGN: Tensor) -> Tensor:
    """Sum over t' >= t of per-token rewards, [..., G, N].

    Token t cannot influence the features before it and influences all from its own on, so this, and not the token's
    own reward, is what makes the policy gradient that of the loss summed over the tokens.
    """
    return rewards_BKGN.flip(-2).cumsum(-2).flip(-2)


def _mean_of_others(x: Tensor, n: int) -> Tensor:
    return (x.sum(-1, keepdim=True) - x) / (n - 1)


def _group_size(total: Tensor, name: str) -> int:
    """Size n of the groups; refuses n < 2."""
    n = total.shape[-1]
    if n < 2:
        raise ValueError(
            f"num_generations={n} with advantage_estimator={name!r}: it compares the rollouts of a group, "
            "set num_generations >= 2 or advantage_estimator: none."
        )
    return n
