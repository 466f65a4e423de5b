"""Bytes of tensors a run holds on one device, by item and stage, and the largest micro-batch that fits: arithmetic.

What stays is counted exactly. What comes and goes is modelled on the code named beside each number below, and is
within 15 % of what is measured: mend a number here when that code changes.
Shape letters: P document tokens, K blocks, N rollouts, G generated tokens, V vocabulary.
"""

from dataclasses import dataclass, replace

from .planning import Method, Network, Work, limited

FLOAT32, BFLOAT16 = 4, 2  # bytes
ADAMW = 2 * FLOAT32  # both moments, per trained parameter
# Float32 copies of a chunk of logits beside the logits themselves: `lm_head.head_log_probs`, forward and backward.
LOGITS_COPIES = 2
# Copies of the LM head's gradient at once: of all chunks so far, of the one at hand, and their sum.
HEAD_GRADIENTS = 2
DRAW_COPIES = 5  # likewise, all in all, of a decoding step's logits: `rollout._draw`
# What a layer holds per token in a forward without gradient: between the layers, within them, inside the MLP.
PASSING_RESIDUAL, PASSING_HIDDEN, PASSING_INNER = 2, 4, 3
# Inputs of the final norm, its results, and the rows that the LM head reads: `logprobs._packed_forward`.
FINAL_HIDDEN = 3
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
    """

    policy: float
    trained: int
    feature: float = 0
    reference: float = 0
    head: int = 0


@dataclass(frozen=True)
class Footprint:
    """Memory of a run, all but the size of its micro-batches.

    Attributes:
        weights: What stays all the time.
        method: Of the run.
        policy: Its shape.
        feature: The shape of the feature network up to its top tap; None without one.
        bf16: Autocast.
        bf16_base: The frozen weights are bfloat16, and so is all between the layers.
        checkpointing: Keep only the input of each layer, and compute the rest again.
        accumulates: Several micro-batches per update: gradients stay between them.
        processes: With more than one, gradients are copied into buckets to be summed.
        logits_per_chunk: Elements of the logits that are computed at a time.
        keys_per_chunk: Own keys of the rollouts that are attended together with one copy of their prefix; None where
            attention copies nothing.
    """

    weights: Weights
    method: Method
    policy: Network
    feature: Network | None = None
    bf16: bool = False
    bf16_base: bool = False
    checkpointing: bool = False
    accumulates: bool = True
    processes: int = 1
    logits_per_chunk: int = 2**25
    keys_per_chunk: int | None = None

    @property
    def compute(self) -> int:
        """Bytes of a number inside the layers."""
        return BFLOAT16 if self.bf16 else FLOAT32

    def lasting(self) -> dict[str, float]:
        """Bytes that are held whatever the micro-batch; gradients where they are all there."""
        weights = self.weights
        return {
            "weights": weights.policy,
            "AdamW state": ADAMW * weights.trained,
            "feature network": weights.feature,
            "reference model": weights.reference,
            "gradients": FLOAT32 * weights.trained * (1 if self.processes == 1 else 2),
        }

    @property
    def residual(self) -> int:
        """Bytes of a number between the layers."""
        return BFLOAT16 if self.bf16_base else FLOAT32

    def memory(self, row: Work, batch_size: int) -> dict[str, float]:
        """Bytes by item, then the most that each stage holds beyond the lasting ones, then the total.

        The stages follow each other, so only the largest is in the total; and without accumulation the gradients grow
        while the activations go.

        Args:
            row: The largest row of a micro-batch, to which all are padded.
            batch_size: Rows.
        """
        lasting = self.lasting()
        tokens = batch_size * (row.tokens + self.method.decoded(row.blocks))
        copies = BFLOAT16 * self.weights.trained if self.bf16 else 0
        layer, inputs = self._kept_by_layer(row, batch_size), tokens * self.residual * self.policy.hidden
        kept = (inputs if self.checkpointing else layer) * self.policy.layers + FINAL_HIDDEN * inputs
        logits = self._logits(row, batch_size)
        parts = {"bf16 copies of weights": copies, "activations": kept, "logits chunk": logits}
        stages = {"update": copies + kept + logits}
        if self.checkpointing:  # a layer that is computed again, and a gradient inside it
            parts["activations"] = again = kept + layer + tokens * self.compute * self.policy.inner
            stages["update"] = max(stages["update"], again + copies / self.policy.layers)
        if row.blocks:
            parts["KV cache"] = 2 * self.compute * self.policy.layers * self.policy.keys * tokens
            stages = self._without_gradient(row, batch_size, parts["KV cache"], copies) | stages
        gradients = lasting["gradients"]
        growing = 0 if self.accumulates or self.processes > 1 else gradients
        at_once = max(*stages.values(), growing + stages["update"] / self.policy.layers)
        total = sum(lasting.values()) - growing + at_once
        return lasting | parts | {f"in {name}": size for name, size in stages.items()} | {"total": total}

    def _without_gradient(self, row: Work, batch_size: int, cache: float, copies: float) -> dict[str, float]:
        """The most that sampling, features and reference hold."""
        document, drawn = batch_size * row.tokens, batch_size * row.blocks * self.method.rollouts
        packed = batch_size * (row.tokens + self.method.decoded(row.blocks))
        logits = DRAW_COPIES * FLOAT32 * self.policy.vocabulary * min(drawn, self._rows_per_chunk())
        prefill = cache * document / packed + self._passing(self.policy, document, self.residual)
        decoding = cache + max(logits, self._passing(self.policy, drawn, self.residual))
        stages = {"sampling": copies + max(prefill, decoding)}
        if self.feature is not None:
            tokens = document + drawn * self.method.completion_length
            stages["features"] = self._passing(self.feature, tokens, self.compute)
        if self.method.reference:
            passing = self._passing(self.policy, packed, self.residual)
            scored = self._per_logit() * self._largest_chunk(row, batch_size)
            stages["reference"] = max(passing, scored + self.residual * self.policy.hidden * packed)
        return stages

    def _passing(self, network: Network, tokens: float, residual: int) -> float:
        """Bytes of a forward that keeps nothing."""
        within = PASSING_HIDDEN * network.hidden + PASSING_INNER * network.inner
        return tokens * (residual * PASSING_RESIDUAL * network.hidden + self.compute * within)

    def _logits(self, row: Work, batch_size: int) -> float:
        """Bytes of the update's LM head: a chunk of logits, or the gradient of the head's weights.

        The backward starts with the rollouts' chunks. From the second chunk on, there is also the gradient so far.
        """
        head, limit = FLOAT32 * self.weights.head, self._rows_per_chunk()
        rollouts = batch_size * self.method.decoded(row.blocks)
        others = min(limit, batch_size * max(row.tokens - row.blocks, row.blocks))
        later = limit if rollouts > limit else others
        per_row = self._per_logit() * self.policy.vocabulary
        gradients = (HEAD_GRADIENTS + self.compute / FLOAT32) * head  # the chunk's own as it comes out of the product
        return max(per_row * min(limit, rollouts), per_row * later + head, gradients)

    def _largest_chunk(self, row: Work, batch_size: int) -> float:
        """Logits of the largest chunk: of the rollouts, or of the document's rows."""
        rows = max(self.method.decoded(row.blocks), row.tokens - row.blocks, row.blocks)
        return self.policy.vocabulary * min(batch_size * rows, self._rows_per_chunk())

    def _rows_per_chunk(self) -> int:
        return max(16, self.logits_per_chunk // self.policy.vocabulary)

    def _per_logit(self) -> int:
        return self.compute + LOGITS_COPIES * FLOAT32

    def _kept_by_layer(self, row: Work, batch_size: int) -> float:
        """Bytes that one layer keeps for its backward: what autograd saves in a Llama layer.

        Both norms keep their input in float32 and, if they are trained, its normalised form. Under autocast q, k, v,
        gate and up cast their input each for itself. Attention keeps queries, keys and values, and its output as it
        comes and as it is projected (`merged.merged_attention`); in `attention.attend`, each chunk of rollouts also
        keeps a copy of its prefix's keys and values, and a mask (equal rows share it, which is not counted on here).
        """
        network, compute, decoded = self.policy, self.compute, self.method.decoded(row.blocks)
        casts = 5 if self.bf16 else 2
        norms = 2 * (1 if self.bf16_base else 2) * FLOAT32 * network.hidden + casts * compute * network.hidden
        attention = compute * (4 * network.queries + 2 * network.keys)
        kept = (row.tokens + decoded) * (norms + attention + 4 * compute * network.inner)
        if decoded and self.keys_per_chunk:
            keys = row.prefixes / row.blocks + self.keys_per_chunk  # that a chunk of rollouts sees
            copies = 2 * network.keys * keys * decoded / self.keys_per_chunk
            kept += compute * (copies + keys * decoded * network.queries / network.keys)
        return batch_size * kept


def largest_batch(footprint: Footprint, row: Work, limit: float) -> int:
    """Most rows like `row` whose total is within `limit` bytes; 0 if not even one is."""
    fits, too_many = 0, 1
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
    smaller = _divisor(batch_size, largest_batch(replace(footprint, accumulates=True), row, limit))
    if 0 < smaller < batch_size:
        return _the_same_update(batch_size, smaller, accumulation)
    checkpointed = replace(footprint, checkpointing=True, accumulates=True)
    smaller = _divisor(batch_size, largest_batch(checkpointed, row, limit))
    if smaller:
        other = f" and {_the_same_update(batch_size, smaller, accumulation)}" if smaller < batch_size else ""
        return f"set gradient_checkpointing: true{other}"
    blocks = int(row.blocks)
    while blocks and not largest_batch(checkpointed, limited(row, blocks), limit):
        blocks //= 2
    if blocks:
        same = f" and {_the_same_update(batch_size, 1, accumulation)}" if batch_size > 1 else ""
        return f"set gradient_checkpointing: true, max_blocks: {blocks}{same}"
    if footprint.weights.trained > LORA_SHARE * footprint.weights.policy / FLOAT32:
        return "train an adapter instead (use_peft: true), take a smaller model, or a device with more memory"
    return "take a smaller model, a smaller max_length, or a device with more memory"


def _divisor(batch_size: int, at_most: int) -> int:
    """The largest divisor of `batch_size` that is at most this; 0 if none is."""
    return next((size for size in range(min(batch_size, at_most), 0, -1) if batch_size % size == 0), 0)


def _the_same_update(batch_size: int, smaller: int, accumulation: int) -> str:
    steps = accumulation * batch_size // smaller
    return f"set per_device_train_batch_size: {smaller} with gradient_accumulation_steps: {steps} (the same update)"
