"""How documents are measured and completions drawn; imports no torch, so that a wrong option is told at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

MEASURES = ("cross_entropy", "feature_matching", "calibration", "diversity")
LENGTHS = (1, 2, 4, 8, 16, 32, 64)
KERNELS = ("rbf", "energy", "characteristic", "ngram")  # beside the inner product

# Measures whose numbers belong to the places of a completion.
BY_POSITION = ("entropy/rollout", "entropy/reference", "cross_entropy/reference")


@dataclass(frozen=True)
class DocumentSettings:
    """What is measured and how.

    Attributes:
        measures: Of `MEASURES`.
        lengths: Completion lengths of the feature-matching loss, in tokens, ascending.
        kernels: Of `KERNELS`: the feature-matching loss also under these.
        num_generations: N, rollouts per context.
        contexts_per_document: At most so many; see `contexts.random_contexts`.
        context_length: Shortest prefix of a context, in tokens.
        temperature: Of the rollouts, and of all numbers of the calibration; `cross_entropy` is at 1.
        seed: Of the rollouts.
        batch_size: Documents per forward.

    Raises:
        ValueError: A name is unknown or a number out of range.
    """

    measures: tuple[str, ...] = MEASURES
    lengths: tuple[int, ...] = LENGTHS
    kernels: tuple[str, ...] = ()
    num_generations: int = 8
    contexts_per_document: int = 4
    context_length: int = 8
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise ValueError(f"metrics={list(self.measures)}: use some of {', '.join(MEASURES)}.")
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"lengths={list(self.lengths)} must be ascending numbers of tokens, each at least 1.")
        if set(self.kernels) - set(KERNELS) or len(set(self.kernels)) < len(self.kernels):
            raise ValueError(f"kernels={list(self.kernels)}: use each of {', '.join(KERNELS)} at most once.")
        if self.kernels and "feature_matching" not in self.measures:
            raise ValueError(f"kernels={list(self.kernels)} needs feature_matching among the metrics.")
        if self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations}: rollouts are compared in pairs, use 2 or more.")
        for name in ("contexts_per_document", "context_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.temperature < inf:
            raise ValueError(
                f"temperature={self.temperature} must be above 0 (a greedy model has one rollout) and finite."
            )

    @property
    def samples(self) -> bool:
        """Whether any measure needs rollouts."""
        return bool({"feature_matching", "calibration", "diversity"} & set(self.measures))

    @property
    def axes(self) -> dict[str, Sequence[int]]:
        """Of each measure that is a curve, what its numbers belong to: lengths, or places in a completion."""
        names, of_kernels = ("loss", "shared", "floor", "excess"), ["", *(f"/{kernel}" for kernel in self.kernels)]
        curves = [f"feature_matching_{name}{kernel}" for kernel in of_kernels for name in names]
        return {**dict.fromkeys(curves, self.lengths), **dict.fromkeys(BY_POSITION, range(1, max(self.lengths) + 1))}


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn.

    Attributes:
        num_samples: Completions of each prompt.
        max_new_tokens: Longest completion.
        temperature: 0 is greedy, and then one sample is all there is.
        top_p: Keep the smallest set of tokens of at least this probability.
        batch_size: Completions at a time.
        seed: Of the noise.

    Raises:
        ValueError: A number is out of range.
    """

    num_samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.temperature < inf or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature}, top_p={self.top_p}: use at least 0, and one in (0, 1].")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(f"num_samples={self.num_samples} at temperature 0 are all alike: use 1, or sample.")
