"""Bytes of tensors a run holds on one device, by item and stage, and the largest micro-batch that fits: arithmetic.

What stays is counted exactly. What comes and goes is modelled on the code named beside each number below, and is
within 15 % of what is measured: mend a number here when that code changes.
Shape letters: P document tokens, K blocks, N rollouts, G generated tokens, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from .planning import Method, Network, Work, limited

FLOAT32, BFLOAT16 = 4, 2  # bytes
ADAMW = 2 * FLOAT32  # both moments, per trained parameter
# Float32 copies of a chunk of logits beside the logits as they come: divided by the temperature, and their log-softmax
# (`lm_head._all_log_probs`). A block's first row keeps one more, the gradient of the documents' own token.
LOGITS_COPIES = 2
# Copies of a chunk of logits while the head's gradient is formed: logits and their gradient (`lm_head._chunk`).
PRODUCT_COPIES = 2
# Copies of a decoding step's logits: divided by the temperature, log-softmax, probabilities (`rollout._draw`).
DRAW_COPIES = 3
# Hidden states of all tokens beside the layers': packed, gathered for the LM head, and the gradient of these
# (`logprobs.Rows.weighted_sum`); or the steps' own, stacked, and packed (`rollout._decode`).
HEAD_HIDDEN = 3
# What a forward without gradient holds per token inside a layer: embeddings, the layer's input, the residual stream
# and its norm; gate, up and their product.
PASSING_HIDDEN, PASSING_INNER = 4, 3
# What a backward holds per token at its first layer beside what the forward kept: the gradients of the head's rows, of
# the residual stream before and after; that of the MLP's product (gate and up have gone by the time theirs come).
BACKWARD_HIDDEN, BACKWARD_INNER = 3, 1
SCORE_COPIES = 2  # of capped scores: after tanh and after softmax (`attention._attention`)
# Layers of FSDP2 that are there whole at a time: gathered, copied out of what was received, and gathered ahead.
LAYERS_AT_ONCE = 3
LORA_SHARE = 0.5  # of the weights: where fewer are trained, an adapter would save little


@dataclass(frozen=True)
class Weights:
    """Bytes and counts of what stays on the device all the time.

    Attributes:
        policy: Bytes of all its parameters.
        trained: Number of trained parameters; they are float32.
        feature: Bytes of the feature network, if it does not share the policy's.
        reference: Bytes of the initial policy, if it does not share the policy's.
        head: Number of trained parameters of the LM head.
        layer: Bytes of the policy's largest layer.
        rest: Bytes of the policy outside its layers.
    """

    policy: float
    trained: int
    feature: float = 0
    reference: float = 0
    head: int = 0
    layer: float = 0
    rest: float = 0


@dataclass(frozen=True)
class Footprint:
    """Memory of a run, all but the size of its micro-batches.

    Attributes:
        weights: What stays all the time.
        method: Of the run.
        policy: Its shape.
        feature: The shape of the feature network up to its top tap; None without one.
        taps: Layers whose output is a feature.
        bf16: Autocast.
        bf16_base: The frozen weights are bfloat16, and so is all between the layers.
        checkpointing: Keep only the input of each layer, and compute the rest again.
        offloading: And keep these in the memory of the CPU.
        accumulates: Several micro-batches per update: gradients stay between them.
        processes: That share the run.
        engine: How: `ddp`, where gradients are copied into buckets to be summed; `zero1` and `zero2`, where the
            optimiser's state and with `zero2` gradients are shared out; `fsdp2`, where all weights are as well.
        gathers: With `fsdp2`, rollouts are sampled with all weights gathered.
        sampled: Rows that are sampled at a time, where that is more than a micro-batch.
        rows_per_chunk: Rows of logits that are computed at a time.
        keys_per_chunk: Own keys of the rollouts that are attended together with one copy of their prefix; None where
            attention copies nothing (`merged`, `flex`).
        masked: The documents' own attention takes a mask: they are packed, or a layer has a sliding window.
        capped_heads: Query heads whose scores are capped (Gemma 2), for which all scores are kept; or 0.
    """

    weights: Weights
    method: Method
    policy: Network
    feature: Network | None = None
    taps: int = 1
    bf16: bool = False
    bf16_base: bool = False
    checkpointing: bool = False
    offloading: bool = False
    accumulates: bool = True
    processes: int = 1
    engine: str = "ddp"
    gathers: bool = False
    sampled: int = 1
    rows_per_chunk: int = 2**10
    keys_per_chunk: int | None = None
    masked: bool = False
    capped_heads: int = 0

    @property
    def compute(self) -> int:
        """Bytes of a number inside the layers."""
        return BFLOAT16 if self.bf16 else FLOAT32

    @property
    def pure(self) -> bool:
        """Whether weights are bfloat16 in a forward, and so is all between the layers; else autocast casts them."""
        return self.bf16 and self.engine != "ddp"

    @property
    def residual(self) -> int:
        """Bytes of a number between the layers."""
        return BFLOAT16 if self.bf16_base or self.pure else FLOAT32

    def lasting(self) -> dict[str, float]:
        """Bytes that are held whatever the micro-batch; gradients where they are all there."""
        weights, trained, share = self.weights, FLOAT32 * self.weights.trained, 1 / self.processes
        everything = share if self.engine == "fsdp2" else 1  # of what does not change
        out = {
            "weights": weights.policy * everything,
            "AdamW state": ADAMW * weights.trained * (1 if self.engine == "ddp" else share),
            "feature network": weights.feature * everything,
            "reference model": weights.reference * everything,
            "gradients": trained * (share if self.engine in ("zero2", "fsdp2") else 1 if self.processes == 1 else 2),
        }
        if self.engine.startswith("zero"):  # DeepSpeed trains a bfloat16 copy of float32 masters
            out["weights"] += trained * share - (trained / 2 if self.bf16 else 0)
        return out

    def _made(self) -> float:
        """Bytes of weights that are made of the lasting ones for a forward."""
        weights = self.weights
        if self.engine == "fsdp2":
            return (LAYERS_AT_ONCE * weights.layer + weights.rest) * self.gathered
        return BFLOAT16 * weights.trained if self.bf16 and not self.pure else 0

    @property
    def gathered(self) -> float:
        """Bytes that FSDP2 gathers for a byte of the policy's weights: trained ones are cast first."""
        trained = FLOAT32 * self.weights.trained
        return (self.compute / FLOAT32 * trained + self.weights.policy - trained) / self.weights.policy

    def _unreduced(self) -> float:
        """Bytes of gradients that FSDP2 has not added up yet: as they come, and in float32 to be sent."""
        if self.engine != "fsdp2":
            return 0
        weights = self.weights
        at_once = max(weights.layer, weights.rest) / weights.policy
        return (self.compute + FLOAT32) * weights.trained * at_once

    def memory(self, row: Work, batch_size: int) -> dict[str, float]:
        """Bytes by item, then the most that each stage holds beyond the lasting ones, then the total.

        Only the largest stage is in the total. Without accumulation the gradients grow while the activations go.

        Args:
            row: The largest row of a micro-batch, to which all are padded.
            batch_size: Rows.
        """
        lasting, tokens, policy = self.lasting(), self._tokens(row, batch_size), self.policy
        copies = self._made()
        layer = self._kept_by_layer(row, batch_size)
        inputs = tokens.packed * self.residual * policy.hidden
        of_layer = 0 if self.offloading else inputs if self.checkpointing else layer
        kept = policy.layers * of_layer + self._kept_by_norms(1) * tokens.packed
        logits = self._logits(row, batch_size)
        name = "gathered weights" if self.engine == "fsdp2" else "bf16 copies of weights"
        parts = {name: copies, "activations": kept, "logits chunk": logits}
        backward = self._backward(row, batch_size, layer) + self._unreduced()
        if self.checkpointing:
            parts["activations"] += layer
            # Autocast's are made again, a layer at a time.
            backward -= 0 if self.engine == "fsdp2" else copies * (1 - 1 / policy.layers)
        stages = {}
        if row.blocks:
            parts |= {} if self._reuses(row) else {"KV cache": self._cache(self._sampled(row, batch_size).packed)}
            stages = self._without_gradient(row, batch_size, copies, kept)
        stages["update"] = copies + kept + max(logits + HEAD_HIDDEN * inputs, backward)
        growing = 0 if self.accumulates or self.processes > 1 else lasting["gradients"]
        at_once = max(*stages.values(), growing + stages["update"] / policy.layers)
        total = sum(lasting.values()) - growing + at_once
        return lasting | parts | {f"in {name}": size for name, size in stages.items()} | {"total": total}

    def _reuses(self, row: Work) -> bool:
        return self.method.reuses(self.checkpointing) and row.blocks > 0

    def _tokens(self, row: Work, batch_size: int) -> "_Tokens":
        document, step = batch_size * row.tokens, batch_size * row.blocks * self.method.rollouts
        return _Tokens(document, step, document + batch_size * self.method.decoded(row.blocks))

    def _without_gradient(self, row: Work, batch_size: int, copies: float, kept: float) -> dict[str, float]:
        """The most that sampling, features and reference hold; on top of the activations, if these are there."""
        tokens, reuses = self._tokens(row, batch_size), self._reuses(row)
        hidden = tokens.packed * self.residual * self.policy.hidden
        if reuses:
            stages, before = {"sampling": copies + kept + self._draw(tokens)}, copies + kept + hidden
        else:
            copies = self.gathered * self.weights.policy if self.engine == "fsdp2" and self.gathers else copies
            stages, before = {"sampling": copies + self._sampling(self._sampled(row, batch_size))}, 0
        if self.feature is not None:
            scored = tokens.document + tokens.step * self.method.completion_length
            other_taps = self.compute * self.feature.hidden * (self.taps - 1)
            stages["features"] = before + self._passing(self.feature, scored, self.compute) + other_taps * scored
        if self.method.reference:
            passing = self._passing(self.policy, tokens.packed, self.residual)
            chunk = self._per_logit() * self.policy.vocabulary * min(tokens.packed, self.rows_per_chunk)
            stages["reference"] = before + max(passing, 2 * hidden + chunk)
        return stages

    def _sampling(self, tokens: "_Tokens") -> float:
        """The most that a prefill or a step of decoding holds."""
        prefill = self._cache(tokens.document) + self._passing(self.policy, tokens.document, self.residual)
        hidden = HEAD_HIDDEN * tokens.packed * self.residual * self.policy.hidden
        step = max(self._draw(tokens), hidden, self._passing(self.policy, tokens.step, self.residual))
        return max(prefill, self._cache(tokens.packed) + step)

    def _draw(self, tokens: "_Tokens") -> float:
        return DRAW_COPIES * FLOAT32 * self.policy.vocabulary * min(tokens.step, self.rows_per_chunk)

    def _sampled(self, row: Work, batch_size: int) -> "_Tokens":
        return self._tokens(row, max(batch_size, self.sampled))

    def _cache(self, tokens: float) -> float:
        """Bytes of keys, which the rotation makes as wide as what is between the layers, and values."""
        return (self.residual + self.compute) * self.policy.layers * self.policy.keys * tokens

    def _passing(self, network: Network, tokens: float, residual: int) -> float:
        """Bytes of a forward that keeps nothing."""
        within = residual * PASSING_HIDDEN * network.hidden + self.compute * PASSING_INNER * network.inner
        return tokens * within

    def _backward(self, row: Work, batch_size: int, layer: float) -> float:
        """The most that the backward holds beside all that the forward kept."""
        tokens, policy = self._tokens(row, batch_size), self.policy
        within = self.residual * BACKWARD_HIDDEN * policy.hidden + self.compute * BACKWARD_INNER * policy.inner
        if not self._reuses(row):
            return tokens.packed * within + (layer if self.checkpointing else 0)
        # The decoding goes backwards step by step. Until the documents' turn, the gradients of the weights, which all
        # steps share, wait beside those of earlier micro-batches; and so do those of the keys and values.
        steps = max(1, self.method.completion_length - 1)
        of_steps = policy.layers * (layer - self._kept_by_layer(row._replace(blocks=0, prefixes=0), batch_size))
        keys = 2 * self.residual * policy.layers * policy.keys
        at_hand = 2 * min(self.weights.trained, policy.hidden * policy.inner)  # one weight's gradient, and the new sum
        waiting = FLOAT32 * (self.weights.trained + at_hand) + keys * tokens.document
        first = keys * tokens.step * (steps - 1) - of_steps / steps
        return waiting + max(first, tokens.document * within - of_steps)

    def _logits(self, row: Work, batch_size: int) -> float:
        """Bytes of the LM head in the update: a chunk of logits, its gradient, the gradient of the head's weights."""
        limit, head, vocabulary = self.rows_per_chunk, FLOAT32 * self.weights.head, self.policy.vocabulary
        starts = min(limit, batch_size * row.blocks)
        rows = min(limit, batch_size * max(row.tokens - row.blocks, self.method.decoded(row.blocks)))
        scoring = max((self._per_logit() + FLOAT32) * starts, self._per_logit() * rows) * vocabulary
        product = PRODUCT_COPIES * self.compute * max(starts, rows) * vocabulary
        # The chunk's own gradient of the head, as it comes out of the product and in float32.
        new = head if not self.bf16 else head + self.compute * self.weights.head
        return head + max(scoring, product + new)

    def _per_logit(self) -> int:
        return self.compute + FLOAT32 * (LOGITS_COPIES + self.bf16)

    def _kept_by_norms(self, count: int) -> float:
        """Bytes per token of that many norms: their input and, if they are trained, its normalised form."""
        return count * (2 if self.method.trained == 1 else 1) * FLOAT32 * self.policy.hidden

    def _kept_by_layer(self, row: Work, batch_size: int) -> float:
        """Bytes that one layer keeps for its backward: what autograd saves in a Llama layer.

        Under autocast q, k, v, gate and up cast their input each for itself. Attention keeps queries, keys, values,
        its output as it comes and as it is projected; the MLP gate, its activation, up and their product.
        """
        network, compute, decoded = self.policy, self.compute, self.method.decoded(row.blocks)
        casts = 5 if self.bf16 and not self.pure else 2
        products = casts * network.hidden + 3 * network.queries + 4 * network.inner
        per_token = self._kept_by_norms(2) + compute * products
        # With one forward, each decoding step keeps its rollouts' keys so far: 1 + 2 + ... + (G - 1) tokens of each.
        own = decoded * self.method.completion_length / 2 if self._reuses(row) else decoded
        keys = 2 * compute * network.keys * (row.tokens + own)
        return batch_size * (per_token * (row.tokens + decoded) + keys + self._kept_by_attention(row, own))

    def _kept_by_attention(self, row: Work, own: float) -> float:
        """Bytes that a row's attention keeps in one layer beside queries, keys, values and outputs.

        Args:
            row: The row.
            own: Tokens of rollouts whose keys are kept.
        """
        network, compute, decoded = self.policy, self.compute, self.method.decoded(row.blocks)
        shared = network.queries / network.keys  # query heads per key head
        kept = 0.0
        if self.masked:  # queries by key head, and the mask as numbers
            kept += compute * row.tokens * (network.queries + shared * row.tokens)
        if self.capped_heads:
            kept += SCORE_COPIES * FLOAT32 * self.capped_heads * row.tokens**2
        if decoded and self.keys_per_chunk:
            seen = row.prefixes / row.blocks + self.keys_per_chunk  # keys, by a chunk of rollouts
            copies = 2 * network.keys * seen * own / self.keys_per_chunk
            kept += compute * (copies + network.queries * decoded)
            per_pair = SCORE_COPIES * FLOAT32 * self.capped_heads or compute * shared  # scores, or the mask
            kept += per_pair * seen * decoded
        return kept


class _Tokens(NamedTuple):
    """A micro-batch in tokens: of its documents, of one decoding step, and all that go through the policy."""

    document: float
    step: float
    packed: float


def largest_batch(footprint: Footprint, row: Work, limit: float) -> int:
    """Most rows like `row`, sampled by themselves, whose total is within `limit` bytes; 0 if not even one is."""
    footprint, fits, too_many = replace(footprint, sampled=1), 0, 1
    while footprint.memory(row, too_many)["total"] <= limit:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if footprint.memory(row, middle)["total"] <= limit:
            fits = middle
        else:
            too_many = middle
    return fits


def what_fits(footprint: Footprint, row: Work, batch_size: int, accumulation: int, limit: float) -> str:
    """What to change so that an update of `batch_size * accumulation` rows fits into `limit` bytes, in words.

    Args:
        footprint: Of the run that does not fit.
        row: Its largest row.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of an update.
        limit: Bytes of the device.
    """
    if footprint.sampled > batch_size and largest_batch(footprint, row, limit) >= batch_size:
        return f"set {sampled_at_once(footprint, row, batch_size, limit)}"
    accumulating = replace(footprint, accumulates=True)
    smaller = _divisor(batch_size, largest_batch(accumulating, row, limit))
    if 0 < smaller < batch_size:
        return _the_same_update(batch_size, smaller, accumulation) + _and_sampling(accumulating, row, smaller, limit)
    checkpointed = replace(footprint, checkpointing=True, accumulates=True)
    smaller = _divisor(batch_size, largest_batch(checkpointed, row, limit))
    if smaller:
        other = f" and {_the_same_update(batch_size, smaller, accumulation)}" if smaller < batch_size else ""
        return f"set gradient_checkpointing: true{other}" + _and_sampling(checkpointed, row, smaller, limit)
    blocks = int(row.blocks)
    while blocks and not largest_batch(checkpointed, limited(row, blocks), limit):
        blocks //= 2
    if blocks:
        same = f" and {_the_same_update(batch_size, 1, accumulation)}" if batch_size > 1 else ""
        more = _and_sampling(checkpointed, limited(row, blocks), 1, limit)
        return f"set gradient_checkpointing: true, max_blocks: {blocks}{same}{more}"
    if footprint.weights.trained > LORA_SHARE * footprint.weights.policy / FLOAT32:
        return "train an adapter instead (use_peft: true), take a smaller model, or a device with more memory"
    return "take a smaller model, a smaller max_length, or a device with more memory"


def sampled_at_once(footprint: Footprint, row: Work, batch_size: int, limit: float) -> str:
    """The setting with which micro-batches that fit are also sampled within `limit` bytes; "" if as it is."""
    count = max(batch_size, footprint.sampled)
    while count > batch_size and replace(footprint, sampled=count).memory(row, batch_size)["total"] > limit:
        count -= 1
    return f"per_device_generation_batch_size: {count}" if count < footprint.sampled else ""


def _and_sampling(footprint: Footprint, row: Work, batch_size: int, limit: float) -> str:
    setting = sampled_at_once(footprint, row, batch_size, limit)
    return f" and {setting}" if setting else ""


def _divisor(batch_size: int, at_most: int) -> int:
    """The largest divisor of `batch_size` that is at most this; 0 if none is."""
    return next((size for size in range(min(batch_size, at_most), 0, -1) if batch_size % size == 0), 0)


def _the_same_update(batch_size: int, smaller: int, accumulation: int) -> str:
    steps = accumulation * batch_size // smaller
    return f"set per_device_train_batch_size: {smaller} with gradient_accumulation_steps: {steps} (the same update)"
