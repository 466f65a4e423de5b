"""What a run costs before it starts: updates, token-forwards, floating-point operations, bytes. Pure arithmetic.

A token-forward is one token going once through all layers of the policy; unlike seconds, it does not depend on the
machine.
Shape letters: P document tokens, K blocks, N rollouts, G generated tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

FLOAT32, BFLOAT16 = 4, 2  # bytes
ADAMW = 2 * FLOAT32  # both moments, per trained parameter
LOGITS_COPIES = 5  # float32 copies of a chunk of logits that are alive at once in its backward


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
        rows: Rows of the dataset (documents, or several of them packed); None if it cannot be counted.
        largest_row: The largest tokens, blocks, prefixes and pairs of a row, each by itself.
    """

    sizes: list[Work]
    rows: int | None
    largest_row: Work

    @classmethod
    def of_length(cls, length: int, stride: int, context_length: int, completion_length: int, max_blocks: int | None):
        """Documents of one length with blocks all over, of which nobody knows how many there are."""
        blocks = max(0, (length - completion_length - context_length) // stride + 1)
        prefixes = blocks * context_length + stride * blocks * (blocks - 1) / 2
        size = limited(Work(length, blocks, prefixes, length * (length + 1) / 2), max_blocks)
        return cls([size], None, size)

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
        feature_depth: Share of the feature network's layers up to its top tap.
        trained: Share of the layers' weights that are trained: frozen ones need no gradient of their own.
    """

    rollouts: int
    completion_length: int
    reference: bool = False
    feature_depth: float = 0.75
    trained: float = 1.0

    def passes(self, checkpointing: bool) -> float:
        """Cost of forward and backward in forwards: 3, and one more where activations are computed twice."""
        return 2 + self.trained + checkpointing

    def decoded(self, blocks: float) -> float:
        """Generated tokens that go through the policy: a rollout's last one predicts nothing."""
        return blocks * self.rollouts * (self.completion_length - 1)


def token_forwards(work: Work, method: Method, checkpointing: bool = False) -> dict[str, float]:
    """Token-forwards by stage, their total, those of SFT's update on the same documents, and the ratio of the two."""
    packed = work.tokens + method.decoded(work.blocks)
    generated = work.blocks * method.rollouts * method.completion_length
    stages = {}
    if work.blocks:
        stages = {"sampling": packed, "features": method.feature_depth * (work.tokens + generated)}
        if method.reference:
            stages["reference"] = packed
    stages["update"] = method.passes(checkpointing) * packed
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
    if work.blocks and feature is not None:
        scored = layers + policy.head(work.blocks + decoded)
        stages = {"sampling": scored, "features": feature.forward(work.tokens + work.blocks * N * G, pairs(G))}
        if method.reference:
            stages["reference"] = scored
    # Every chunk of logits is computed again in the backward, checkpointing or not.
    head = (3 + (method.trained == 1)) * policy.head(work.tokens + decoded)
    return stages | {"update": method.passes(checkpointing) * layers + head}


@dataclass(frozen=True)
class Weights:
    """Bytes and counts of what stays on the device all the time.

    Attributes:
        policy: Bytes of all its parameters.
        trained: Number of trained parameters; they are float32.
        feature: Bytes of the feature network, if it does not share the policy's.
        reference: Bytes of the initial policy, if it does not share the policy's.
    """

    policy: float
    trained: int
    feature: float = 0
    reference: float = 0


def memory(
    weights: Weights,
    micro_batch: Work,
    batch_size: int,
    method: Method,
    policy: Network,
    *,
    bf16: bool,
    checkpointing: bool,
    processes: int = 1,
    logits_per_chunk: int,
    keys_per_chunk: int,
) -> dict[str, float]:
    """Bytes on one device by item, at the largest micro-batch.

    Sampling, with its cache, and update, with its activations, follow each other: only the larger is in the total.

    Args:
        weights: What stays all the time.
        micro_batch: The largest row; every row of the batch is padded to it.
        batch_size: Rows.
        method: Of the run.
        policy: Its shape.
        bf16: Autocast.
        checkpointing: Keep only the input of each layer, and compute the rest again.
        processes: With more than one, gradients are copied into buckets to be summed.
        logits_per_chunk: Elements of the logits that are computed at a time.
        keys_per_chunk: Own keys of the rollouts that are attended together with one copy of their prefix.
    """
    compute = BFLOAT16 if bf16 else FLOAT32
    tokens = batch_size * (micro_batch.tokens + method.decoded(micro_batch.blocks))
    held = {
        "weights": weights.policy,
        "bf16 copies of weights": BFLOAT16 * weights.trained if bf16 else 0,
        "gradients": FLOAT32 * weights.trained * (1 if processes == 1 else 2),
        "AdamW state": ADAMW * weights.trained,
        "feature network": weights.feature,
        "reference model": weights.reference,
    }
    logits = LOGITS_COPIES * FLOAT32 * min(logits_per_chunk, tokens * policy.vocabulary)
    cache = 2 * compute * policy.layers * policy.keys * tokens if micro_batch.blocks else 0
    layer = tokens * _kept_per_token(policy, bf16)
    layer += batch_size * _kept_per_row(micro_batch, method, policy, compute, keys_per_chunk)
    inputs = tokens * FLOAT32 * policy.hidden
    activations = layer + inputs * policy.layers if checkpointing else layer * policy.layers
    activations += 4 * inputs  # the final norm's, and the rows the LM head reads
    total = sum(held.values()) + logits + max(cache, activations)
    return held | {"activations": activations, "logits chunk": logits, "KV cache": cache, "total": total}


def _kept_per_token(network: Network, bf16: bool) -> float:
    """Bytes that one layer keeps per token for its backward: what autograd saves in a Llama layer.

    Both norms keep their input and its normalised form in float32. Under autocast q, k, v, gate and up cast their
    input each for itself. Attention keeps queries, keys and values, and its output as it comes and as it is projected.
    """
    compute, casts = (BFLOAT16, 5) if bf16 else (FLOAT32, 2)
    norms = 2 * 2 * FLOAT32 * network.hidden + casts * compute * network.hidden
    attention = compute * (4 * network.queries + 2 * network.keys)
    return norms + attention + 4 * compute * network.inner


def _kept_per_row(row: Work, method: Method, network: Network, compute: int, keys_per_chunk: int) -> float:
    """Bytes that one layer keeps per row for what its rollouts share.

    Each chunk of rollouts copies the keys and values of its prefix, and has a mask (equal rows share it, which is not
    counted on here).
    """
    decoded = method.decoded(row.blocks)
    if not decoded:
        return 0.0
    keys = row.prefixes / row.blocks + keys_per_chunk  # that a chunk of rollouts sees
    copies = 2 * network.keys * keys * decoded / keys_per_chunk
    return compute * (copies + keys * decoded * network.queries / network.keys)
