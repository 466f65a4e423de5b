"""Rollouts of one micro-batch and what they are worth; their sums for the metrics, and their rows on disk.

Shape letters: B rows, K blocks, N rollouts, G generated tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import BlockLayout
from .metrics import completion_sums, rollout_sums, sum_over_blocks
from .rewards import Gram, Rewards, loss_from_gram, rewards_from_gram
from .rollout import Rollouts

CONTEXT_TOKENS = 64  # of the prefix that are written beside a rollout
UNFINISHED = "\ufffd"  # what tokenizers write for a part of a character


@dataclass(frozen=True, eq=False)
class Experience:
    """Rollouts of one micro-batch and what they are worth.

    Attributes:
        rollouts: Tokens, log-probs and entropy, each [B, K, N, G].
        gram: Inner products of the features, per group.
        rewards: Each [B, K, N], or [B, K, G, N] with per-token features.
        kl: k1 estimate of each block's KL to the initial policy [B, K, N], or None without `beta`.
        reference_log_probs: The initial policy's [B, K, N, G], or None without `beta`.
    """

    rollouts: Rollouts
    gram: Gram
    rewards: Rewards
    kl: Tensor | None = None
    reference_log_probs: Tensor | None = None


def experience_sums(experience: Experience, layout: BlockLayout) -> dict[str, Tensor]:
    """Sums per row [B] of a batch of rollouts; see `metrics.rollout_sums` and `completion_sums`."""
    gram, device = experience.gram, experience.gram.cross.device
    diversity = 1.0 if gram.cross.shape[-1] > 1 else 0.0
    plain = rewards_from_gram(gram, whitening="none", diversity_coef=diversity)
    feature_loss = loss_from_gram(gram, unbiased=gram.cross.shape[-1] > 1)
    rollouts, valid = experience.rollouts, layout.valid.to(device)
    tokens, entropy = rollouts.tokens.shape[-1], rollouts.entropy.to(device)
    ends: dict[str, Tensor] = {}
    if rollouts.lengths is not None and rollouts.clipped is not None:
        tokens = rollouts.lengths.clamp(min=1).to(device)
        entropy = entropy.sum(-1) / tokens
        ends = completion_sums(rollouts.lengths.to(device), rollouts.clipped.to(device), valid)
    sums = rollout_sums(experience.rewards, plain, feature_loss, rollouts.tokens, entropy, valid)
    if experience.kl is not None:
        # Nats per token, as in TRL.
        sums["kl"] = sum_over_blocks(experience.kl.to(device) / tokens, valid)
    return sums | ends


def predictions_of(
    input_ids: Tensor, layout: BlockLayout, rollouts: Rollouts | None, num_generations: int
) -> tuple[Tensor, Tensor]:
    """What `compute_metrics` gets: rollouts [B, K, N, G] and references [B, K, G], -100 where there is no token.

    Args:
        input_ids: LongTensor [B, P].
        layout: As the batch was laid out: batches with G alike can be joined.
        rollouts: Of the batch, or None.
        num_generations: N.
    """
    references = layout.references(input_ids)
    references = pad(references, (0, layout.completion_length - references.shape[-1]), value=-100)
    B, K, G = references.shape
    predictions = references.new_full((B, K, num_generations, G), -100)
    if rollouts is not None:
        there = layout.valid[..., None, None].to(references.device)
        there = there if rollouts.mask is None else there & rollouts.mask
        predictions[..., : rollouts.tokens.shape[-1]] = rollouts.tokens.where(there, -100)
    return predictions, references


def rollout_rows(
    inputs: dict[str, Any], experience: Experience, advantages: Tensor, tokenizer, step: int
) -> list[dict[str, Any]]:
    """One row per rollout for `rollouts/step_*.parquet`, numbers as in the step."""
    layout, tokens = inputs["layout"], experience.rollouts.tokens.cpu()
    lengths = experience.rollouts.lengths
    lengths = torch.full(tokens.shape[:3], tokens.shape[3]) if lengths is None else lengths.cpu()
    references = layout.references(inputs["input_ids"]).cpu()
    per_rollout = {
        "alignment": experience.rewards.alignment,
        "diversity": experience.rewards.diversity,
        "reward": experience.rewards.total,
    }
    if experience.rewards.total.ndim == 4:  # per token: [B, K, G, N] -> mean over the block
        per_rollout = {k: v.mean(2) for k, v in per_rollout.items()}
    per_rollout["advantage"] = advantages.mean(-1) if advantages.ndim == 4 else advantages
    per_rollout["log_prob"] = experience.rollouts.log_probs.sum(-1)
    numbers = {k: v.double().cpu() for k, v in per_rollout.items()}
    token_log_probs = experience.rollouts.log_probs.float().cpu()
    texts: dict[int, str] = {}
    loss = loss_from_gram(experience.gram, unbiased=tokens.shape[2] > 1).cpu()
    loss = loss.mean(-1) if loss.ndim == 3 else loss
    input_ids, documents = inputs["input_ids"].cpu(), inputs["document_ids"].cpu()

    rows = []
    for b, k in layout.valid.nonzero().tolist():
        anchor, begin = int(layout.anchors[b, k]), int(layout.prefix_starts[b, k])
        document = int(documents[b, layout.doc_ids[b, anchor]])
        shared = {
            "step": step,
            "document_id": document,
            "block": anchor - begin,
            "context": tokenizer.decode(input_ids[b, max(begin, anchor - CONTEXT_TOKENS) : anchor]),
            "reference": tokenizer.decode([token for token in references[b, k].tolist() if token >= 0]),
            "feature_matching_loss": float(loss[b, k]),
        }
        for n in range(tokens.shape[2]):
            token_ids = tokens[b, k, n, : lengths[b, k, n]].tolist()
            row = {
                "rollout": n,
                "completion": tokenizer.decode(token_ids),
                "token_ids": token_ids,
                "token_texts": token_texts(token_ids, tokenizer, texts),
                "token_log_probs": token_log_probs[b, k, n, : len(token_ids)].tolist(),
            }
            rows.append(shared | row | {name: float(value[b, k, n]) for name, value in numbers.items()})
    return rows


def token_texts(token_ids: list[int], tokenizer, known: dict[int, str]) -> list[str]:
    """What each token adds to the text: joined, they are the decoded completion.

    A token that ends inside a character adds nothing, and the one that completes it the whole character.

    Args:
        token_ids: Of one completion.
        tokenizer: Decodes them.
        known: Texts of single tokens decoded before; added to. Most tokens always mean the same text, and decoding
            each of them only once is what keeps this cheap.
    """
    whole = tokenizer.decode(token_ids)
    for token in token_ids:
        if token not in known:
            known[token] = tokenizer.decode([token])
    texts = [known[token] for token in token_ids]
    if "".join(texts) == whole and UNFINISHED not in whole:
        return texts
    # Characters of several tokens, or a tokenizer that trims a text's first space: look at what each token changes.
    # Texts are compared from `start` on, the token before the last that was told, for the time to grow linearly.
    texts, start, told = [], 0, 0
    for end in range(1, len(token_ids) + 1):
        before, now = tokenizer.decode(token_ids[start:told]), tokenizer.decode(token_ids[start:end])
        if now.endswith(UNFINISHED) and end < len(token_ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, told = told, end
    return texts
