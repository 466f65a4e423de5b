"""What an arm's update is counted to cost, before anything runs: token-forwards, operations, bytes.

Shape letters: P document tokens, K blocks, N rollouts, G generated tokens.
"""

import psutil
import torch

from benchmarks import published
from benchmarks.arms import Bench
from benchmarks.shapes import Workload
from ebft.planning import Method, operations, token_forwards
from ebft.sizes import network_shape, trained_share

LOGITS_COPIES = 4  # of full float32 logits: themselves, their log-softmax, and the gradients of both


def method_of(arm: str, workload: Workload, bench: Bench) -> Method:
    """What of the settings decides the counted cost of a document."""
    share = trained_share(bench.lm.base_model)
    depth = max(bench.network.layer_indices) / bench.lm.config.num_hidden_layers
    sizes = workload.num_generations, workload.completion_length
    return Method(*sizes, feature_depth=depth, trained=share, reuse=arm == "ours_reused")


def forwards(arm: str, workload: Workload, bench: Bench, checkpointing: bool | None = None) -> dict[str, float]:
    """Token-forwards of one document by stage, and `total`.

    Args:
        arm: One of `arms.ARMS`.
        workload: Sizes.
        bench: The networks.
        checkpointing: Whether activations are computed twice; by default as in the run.
    """
    work, method = workload.work(), method_of(arm, workload, bench)
    checkpointing = bench.options.checkpointing if checkpointing is None else checkpointing
    if arm == "published":
        return published.token_forwards(work, method, checkpointing)
    counted = token_forwards(work, method, checkpointing)
    if arm == "sft":
        return {"update": counted["sft"], "total": counted["sft"]}
    if arm == "ours_reused":  # one stage
        return {"update": counted["total"], "total": counted["total"]}
    return {stage: counted[stage] for stage in ("sampling", "features", "update", "total")}


def needed_operations(arm: str, workload: Workload, bench: Bench) -> dict[str, float]:
    """Floating-point operations of one document by stage that the arm's result needs, and `total`.

    As `ebft.planning.operations` counts them, without checkpointing's second forward. Those of the published scheme
    are ours: it computes the same.
    """
    policy, feature = network_shape(bench.lm.base_model), network_shape(bench.network.decoder)
    work, method = workload.work(), method_of(arm, workload, bench)
    if arm == "sft":
        passes = method.passes(False)
        stages = {"update": passes * (policy.forward(work.tokens, work.pairs) + policy.head(work.tokens))}
    else:
        stages = operations(work, method, policy, feature, False)
    total = sum(stages.values())
    return ({"update": total} if arm == "ours_reused" else stages) | {"total": total}


def needed_linear_operations(arm: str, workload: Workload, bench: Bench) -> float:
    """Floating-point operations of one document in the layers' weights: 2 per weight and token-forward it needs."""
    arm = "ours" if arm == "published" else arm
    return 2 * network_shape(bench.lm.base_model).matrices * forwards(arm, workload, bench, False)["total"]


def memory_note(arm: str, workload: Workload, bench: Bench) -> str | None:
    """A warning if full logits and activations of a micro-batch look larger than what is free; roughly, as a note."""
    policy, options, w = network_shape(bench.lm.base_model), bench.options, workload
    if arm.startswith("ours"):  # never holds full logits: `ebft plan` estimates it
        return None
    K = w.layout().num_blocks if arm == "published" else 0
    tokens = w.micro_batch * (w.num_generations * (w.max_length + K * w.completion_length) if K else w.max_length)
    compute = options.dtype.itemsize
    kept = compute * (8 * policy.hidden + 4 * policy.queries + 2 * policy.keys + 4 * policy.inner)
    layers = policy.layers * 4 * policy.hidden + kept if options.checkpointing else policy.layers * kept
    wanted = tokens * (layers + LOGITS_COPIES * 4 * policy.vocabulary)
    if options.device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        free, _ = torch.get_device_module(options.device).mem_get_info(options.device)
    if wanted < free:
        return None
    return (
        f"{arm} with micro_batch={w.micro_batch} takes roughly {wanted / 2**30:.1f} GiB beside the weights, "
        f"{free / 2**30:.1f} GiB are free: if it runs out, lower micro_batch, or leave it out with --arms."
    )
