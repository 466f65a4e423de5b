"""How different a model's rollouts of one context are from each other: duplicates, distinct n-grams, self-BLEU."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import takewhile

Tokens = Sequence[int]


def duplicate_rate(rollouts: Sequence[Tokens]) -> float:
    """Share of the rollouts that repeat an earlier one, token by token."""
    return 1 - len({tuple(rollout) for rollout in rollouts}) / len(rollouts)


def distinct(rollouts: Sequence[Tokens], n: int) -> float | None:
    """Different n-grams over all n-grams of all rollouts (distinct-n, Li et al. 2016); None where none is so long."""
    grams = [tuple(rollout[i : i + n]) for rollout in rollouts for i in range(len(rollout) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean sentence BLEU (0 to 100) of each text against all others (Zhu et al. 2018); high means alike.

    Empty texts are left out; None where fewer than two are left, or sacrebleu is not installed.
    """
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2 or not has_self_bleu():
        return None
    from sacrebleu import sentence_bleu

    scores = [sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


def has_self_bleu() -> bool:
    """Whether sacrebleu, an optional extra, is there."""
    return find_spec("sacrebleu") is not None


def until_end(tokens: Tokens, ends: Sequence[int]) -> list[int]:
    """Tokens up to the first of `ends`, without it."""
    return list(takewhile(lambda token: token not in ends, tokens))
