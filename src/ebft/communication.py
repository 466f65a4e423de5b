"""Bytes that each process sends in an update, by what they are: ring collectives, counted. Pure arithmetic.

A gather or a sum into shares of X bytes over N processes takes (N - 1) / N * X of each, and a sum that all keep twice
that. Each is counted as if none overlapped with another or with computation; latency is not counted.
"""

from .footprint import BFLOAT16, FLOAT32, Footprint


def bytes_per_update(run: Footprint, micro_batches: int, sampled: int) -> dict[str, float]:
    """Bytes that a process sends, and receives, in one update, and their total.

    Under FSDP2 each forward gathers all weights (those of a rollout together if it `gathers`), each backward once
    more, and each micro-batch sums its gradients into shares; what lies outside the layers is gathered less often
    than counted here.

    Args:
        run: Of one process.
        micro_batches: Of an update, on each process.
        sampled: Times that rollouts are sampled in an update: once per micro-batch, or for several at once.
    """
    weights, part = run.weights, (run.processes - 1) / run.processes
    trained = FLOAT32 * weights.trained
    parts: dict[str, float] = {}
    if run.engine in ("ddp", "zero1"):
        parts["gradients"] = 2 * trained
    if run.engine == "zero2":
        parts["gradients"] = micro_batches * trained * run.compute / FLOAT32
    if run.engine.startswith("zero"):
        parts["weights"] = weights.trained * (BFLOAT16 if run.bf16 else FLOAT32)
    if run.engine == "fsdp2":
        once = run.gathered * weights.policy
        shared = once * run.method.feature_depth
        reference = weights.reference * run.compute / FLOAT32 or once
        parts = {
            "sampling": sampled * (1 if run.gathers else run.method.completion_length) * once,
            "features": micro_batches * (weights.feature or shared),
            "reference": micro_batches * reference * run.method.reference,
            "update": micro_batches * 2 * once,
            "gradients": micro_batches * trained,
        }
    parts = {name: part * size for name, size in parts.items()}
    return parts | {"total": sum(parts.values())}
