"""What is measured of a batch, as sums per row, and the metrics made of them (names as in TRL where it has one).

Sums add up over rows, micro-batches and ranks; means are taken once, at the end, so that no number depends on how a
step was cut up. Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens.
"""

from typing import Any

import torch
from torch import Tensor

from .rewards import Rewards

COMPLETION_MEANS = ("completions/mean_length", "completions/clipped_ratio")  # of rollouts that end
# Metric -> its denominator among the sums.
MEANS = {
    "reward": "blocks",
    "reward_std": "blocks",
    "rewards/alignment/mean": "blocks",
    "rewards/diversity/mean": "blocks",
    "rewards/alignment_unwhitened/mean": "blocks",
    "rewards/diversity_unwhitened/mean": "blocks",
    "frac_reward_zero_std": "blocks",
    "feature_matching_loss": "blocks",
    "entropy": "blocks",
    "kl": "blocks",
    "completions/duplicate_rate": "blocks",
    **dict.fromkeys(COMPLETION_MEANS, "blocks"),
    "feature_classifier/loss": "classified",
    "feature_classifier/accuracy": "classified",
    "ce_loss": "ce_tokens",
    "ce_loss/all": "all_tokens",
    "ce_loss/answer": "answer_tokens",
}
# Every sum an evaluation adds up.
EVALUATION_SUMS = [*MEANS, "reward_squared", *dict.fromkeys(MEANS.values())]


def rollout_sums(
    rewards: Rewards, plain: Rewards, feature_loss: Tensor, tokens: Tensor, entropy: Tensor, valid: Tensor
) -> dict[str, Tensor]:
    """Sums over the valid blocks of each row, of each block's mean over its rollouts.

    Args:
        rewards: Each [B, K, N], or [B, K, G, N] per token.
        plain: The same without whitening, which unlike whitened ones measures progress.
        feature_loss: Unbiased feature-matching loss [B, K] or [B, K, G].
        tokens: LongTensor [B, K, N, G].
        entropy: [B, K, N, G], of the sampling distribution at each token.
        valid: BoolTensor [B, K].

    Returns:
        float64 [B] each.
    """
    valid = valid.to(rewards.total.device)
    spread = rewards.total.std(-1) if rewards.total.shape[-1] > 1 else torch.zeros_like(rewards.total[..., 0])
    group_mean = rewards.total.mean(-1)
    per_block = {
        "reward": group_mean,
        "reward_squared": group_mean.square(),
        "reward_std": spread,
        "rewards/alignment/mean": rewards.alignment,
        "rewards/diversity/mean": rewards.diversity,
        "rewards/alignment_unwhitened/mean": plain.alignment,
        "rewards/diversity_unwhitened/mean": plain.diversity,
        "frac_reward_zero_std": (spread < 1e-8).double(),
        "feature_matching_loss": feature_loss,
        "entropy": entropy.to(valid.device),
        "completions/duplicate_rate": duplicates(tokens).to(valid.device),
        "blocks": torch.ones_like(valid),
    }
    return {name: sum_over_blocks(value, valid) for name, value in per_block.items()}


def completion_sums(lengths: Tensor, clipped: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """As `rollout_sums`, of rollouts that end: tokens of each, and which had no end, [B, K, N]."""
    return {name: sum_over_blocks(x, valid) for name, x in zip(COMPLETION_MEANS, (lengths, clipped), strict=True)}


def sum_over_blocks(value: Tensor, valid: Tensor) -> Tensor:
    """[B, K, ...] to [B]: mean over what follows K, then sum over the valid blocks; invalid ones may hold anything."""
    value = value.double().flatten(2).mean(-1) if value.ndim > 2 else value.double()
    return value.where(valid, 0).sum(-1)


def duplicates(tokens: Tensor) -> Tensor:
    """Which rollouts repeat an earlier one of their group: [B, K, N] from tokens [B, K, N, G]."""
    equal = (tokens[:, :, :, None] == tokens[:, :, None]).all(-1)
    return equal.tril(-1).any(-1).double()


def means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from sums over the whole step or evaluation; a metric without anything to average is left out.

    `reward_snr` is the standard deviation between the blocks' mean rewards over the mean standard deviation within
    a block's group: how much of the reward is the context's, which the baseline removes.
    """
    out = {name: sums[name] / sums[count] for name, count in MEANS.items() if name in sums and sums.get(count)}
    if sums.get("blocks") and out.get("reward_std"):
        variance = sums["reward_squared"] / sums["blocks"] - out["reward"] ** 2
        out["reward_snr"] = max(variance, 0.0) ** 0.5 / out["reward_std"]
    return out


def cross_entropy_sums(document_log_probs: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Sums per row [B]: over the tokens trained on, all tokens, and answer tokens, with their counts.

    Args:
        document_log_probs: [B, P-1], there for every token that is summed.
        inputs: `labels`, `doc_ids` and `completion_mask`, [B, P] each.
    """
    doc_ids = inputs["doc_ids"]
    within = (doc_ids[:, 1:] == doc_ids[:, :-1]) & (doc_ids[:, 1:] >= 0)
    masks = {
        "ce_loss": inputs["labels"][:, 1:] != -100,
        "ce_loss/all": within,
        "ce_loss/answer": within & inputs["completion_mask"][:, 1:],
    }
    sums = {}
    for name, mask in masks.items():
        sums[name] = -document_log_probs.double().where(mask, 0).sum(-1)
        sums[MEANS[name]] = mask.double().sum(-1)
    return sums


def evaluation_statistics(sums: dict[str, Tensor], names: list[str]) -> Tensor:
    """[B, len(names)] float64: the named sums of each row, 0 where there is none."""
    rows = next(iter(sums.values()))
    return torch.stack(
        [sums[name].to(rows.device) if name in sums else torch.zeros_like(rows) for name in names], dim=-1
    )
