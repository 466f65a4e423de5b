"""What a run costs before it starts: updates, token-forwards, floating-point operations. Pure arithmetic.

A token-forward is one token going once through all layers of the policy; unlike seconds, it does not depend on the
machine.
Shape letters: P document tokens, K blocks, N rollouts, G generated tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Work(NamedTuple):
    """Documents in sums; floats where they are averages.

    Attributes:
        tokens: Their tokens.
        blocks: Their blocks.
        prefixes: Sum over the blocks of the document tokens before each.
        pairs: Query-key pairs of the documents' own causal attention.
    """

    tokens: float
    blocks: float
    prefixes: float
    pairs: float


@dataclass(frozen=True)
class Documents:
    """Sizes of a run's documents.

    Attributes:
        sizes: One `Work` per document.
        row_sizes: One per row of the dataset (a document, or several of them packed); None if it cannot be counted.
    """

    sizes: list[Work]
    row_sizes: list[Work] | None

    @property
    def rows(self) -> int | None:
        """Rows of the dataset; None if it cannot be counted."""
        return None if self.row_sizes is None else len(self.row_sizes)

    @property
    def largest_row(self) -> Work:
        """The largest tokens, blocks, prefixes and pairs of a row, each by itself."""
        return Work(*map(max, zip(*(self.row_sizes or self.sizes), strict=True)))

    @classmethod
    def of_length(cls, length: int, stride: int, context_length: int, completion_length: int, max_blocks: int | None):
        """Documents of one length with blocks all over, of which nobody knows how many there are."""
        blocks = max(0, (length - completion_length - context_length) // stride + 1)
        prefixes = blocks * context_length + stride * blocks * (blocks - 1) / 2
        return cls([limited(Work(length, blocks, prefixes, length * (length + 1) / 2), max_blocks)], None)

    def step(self, rows_per_step: int) -> tuple[float, Work]:
        """Documents of an average optimiser step, and their sums."""
        rows_per_step = min(rows_per_step, self.rows or rows_per_step)
        count = rows_per_step * len(self.sizes) / (self.rows or len(self.sizes))
        return count, Work(*(sum(column) / len(self.sizes) * count for column in zip(*self.sizes, strict=True)))


def limited(size: Work, max_blocks: int | None) -> Work:
    """A document of which a visit takes at most `max_blocks` blocks, at random."""
    if max_blocks is None or size.blocks <= max_blocks:
        return size
    return size._replace(blocks=max_blocks, prefixes=size.prefixes * max_blocks / size.blocks)


def optimiser_steps(
    rows: int | None, batch_size: int, processes: int, accumulation: int, epochs: float, max_steps: int
) -> tuple[int | None, int | None]:
    """Updates per epoch and in all, as transformers' Trainer counts them; None where the rows are not known."""
    in_all = max_steps if max_steps > 0 else None
    if rows is None:
        return None, in_all
    per_epoch = math.ceil(math.ceil(rows / (batch_size * processes)) / accumulation)
    return per_epoch, in_all or math.ceil(epochs * per_epoch)


@dataclass(frozen=True)
class Method:
    """What of the settings decides the cost of a document.

    Attributes:
        rollouts: N per block.
        completion_length: G.
        reference: Whether the initial policy scores the rollouts (beta > 0).
        feature_depth: Share of the feature network's layers up to its top tap; 0 without one.
        trained: Share of the layers' weights that are trained: frozen ones need no gradient of their own.
        reuse: Without checkpointing, the forward that samples carries the gradient too (`rollout.sample_and_sum`).
        linear: The loss is linear in the log-probs, so that the LM head is not computed again in the backward.
    """

    rollouts: int
    completion_length: int
    reference: bool = False
    feature_depth: float = 0.75
    trained: float = 1.0
    reuse: bool = False
    linear: bool = True

    def passes(self, checkpointing: bool) -> float:
        """Cost of forward and backward in forwards: 3, and one more where activations are computed twice."""
        return 2 + self.trained + checkpointing

    def update_passes(self, work: Work, checkpointing: bool) -> float:
        """As `passes`, of the update alone: sampling may have done the forward."""
        return self.passes(checkpointing) - bool(self.reuses(checkpointing) and work.blocks)

    def reuses(self, checkpointing: bool) -> bool:
        """Whether there is one forward instead of two: checkpointing has nothing to reuse."""
        return self.reuse and not checkpointing

    def decoded(self, blocks: float) -> float:
        """Generated tokens that go through the policy: a rollout's last one predicts nothing."""
        return blocks * self.rollouts * (self.completion_length - 1)


def token_forwards(work: Work, method: Method, checkpointing: bool = False) -> dict[str, float]:
    """Token-forwards by stage, their total, those of SFT's update on the same documents, and the ratio of the two."""
    packed = work.tokens + method.decoded(work.blocks)
    generated = work.blocks * method.rollouts * method.completion_length
    stages = {}
    if work.blocks:
        stages = {"sampling": packed}
        if method.feature_depth:
            stages["features"] = method.feature_depth * (work.tokens + generated)
        if method.reference:
            stages["reference"] = packed
    stages["update"] = method.update_passes(work, checkpointing) * packed
    total, sft = sum(stages.values()), method.passes(checkpointing) * work.tokens
    return stages | {"total": total, "sft": sft, "ratio": total / sft}


@dataclass(frozen=True)
class Network:
    """Shape of a decoder, as far as cost depends on it.

    Attributes:
        layers: Those that run.
        hidden: Size of the residual stream.
        queries: Heads times their size.
        keys: Key heads times their size.
        inner: Size inside the MLP (of all experts a token goes to).
        vocabulary: V.
        matrices: Weights of all its layers that a token is multiplied with.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    matrices: float

    def forward(self, tokens: float, pairs: float) -> float:
        """Floating-point operations of the layers: 2 per weight and token, 4 per query-key pair and channel."""
        return 2 * self.matrices * tokens + 4 * self.layers * self.queries * pairs

    def head(self, rows: float) -> float:
        """Those of the LM head."""
        return 2 * self.hidden * self.vocabulary * rows


def operations(
    work: Work, method: Method, policy: Network, feature: Network | None, checkpointing: bool
) -> dict[str, float]:
    """Floating-point operations by stage, matrix products alone; each query is counted with the keys it needs."""
    N, G, decoded = method.rollouts, method.completion_length, method.decoded(work.blocks)

    def pairs(steps: int) -> float:
        return work.pairs + N * steps * (work.prefixes + work.blocks * (steps + 1) / 2)

    layers = policy.forward(work.tokens + decoded, pairs(G - 1))
    stages = {}
    if work.blocks:
        scored = layers + policy.head(work.blocks + decoded)
        stages = {"sampling": scored}
        if feature is not None:
            stages["features"] = feature.forward(work.tokens + work.blocks * N * G, pairs(G))
        if method.reference:
            stages["reference"] = scored
    # The logits, the gradient of their rows, that of the head; and the logits again where the loss is not linear.
    products = 2 + (method.trained == 1) + (not method.linear)
    head = products * policy.head(work.tokens + decoded)
    return stages | {"update": method.update_passes(work, checkpointing) * layers + head}
