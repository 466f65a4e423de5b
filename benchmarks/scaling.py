"""What runs of 7B and 70B need on 8 to 512 GPUs, computed, not measured: `python -m benchmarks.scaling` prints it.

Memory and bytes sent are those of `ebft plan`; computation goes at the rate that one GPU was measured to reach; links
have the bandwidths given here. What is not in these is not in the table: latency, waiting for the slowest, input.
"""

import argparse
import copy
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.shapes import SETTINGS, Workload, model_config
from ebft import EBFTConfig
from ebft.communication import bytes_per_update
from ebft.features import FeatureNetwork, decoder_up_to, layer_indices
from ebft.footprint import Footprint, largest_batch
from ebft.planning import operations
from ebft.sizes import run_footprint

GIB = 2**30
GPUS = (8, 16, 32, 64, 128, 256, 512)
GPUS_OF_A_NODE = 8
DOCUMENTS = 16  # of an update, as in the paper's runs; at least one per GPU
OF_AN_EPOCH = 1220 * DOCUMENTS  # 20M tokens: the paper's Q&A coding
AT_A_TIME = 4  # documents, at most: the micro-batch that was measured
WORK = Workload(**SETTINGS["qa"])
# Seconds of an update of 16 documents, 4 at a time, on one H200 with gradient checkpointing (docs/performance.md).
MEASURED = {"full": ("Qwen2.5-3B", 7.089), "LoRA": ("Qwen2.5-7B", 13.494)}
MODELS = ("Qwen2.5-7B", "Llama-3.1-70B")


@dataclass(frozen=True)
class Machine:
    """GPUs and their links.

    Attributes:
        memory: Bytes of a GPU.
        node: Bytes per second that a GPU sends to those of its node while it receives as many.
        network: Likewise to other nodes.
    """

    memory: float = 80 * GIB
    node: float = 450e9
    network: float = 50e9


@dataclass(frozen=True)
class Need:
    """One row of the table: what each GPU holds, computes and sends.

    Attributes:
        engine: `ddp` where it fits, else `fsdp2`, with all weights gathered for sampling where that fits.
        documents: Of an update, on all GPUs.
        micro_batch: Documents at a time on a GPU; 0 if not one fits.
        held: Bytes.
        compute: Seconds of an update.
        send: Seconds of an update, with nothing else at the same time.
    """

    engine: str
    documents: int
    micro_batch: int
    held: float
    compute: float
    send: float

    @property
    def hours(self) -> tuple[float, float]:
        """Of an epoch: where all communication hides behind computation, and where none does."""
        updates = OF_AN_EPOCH / self.documents
        return max(self.compute, self.send) * updates / 3600, (self.compute + self.send) * updates / 3600


@cache
def run_of(model: str, way: str) -> Footprint:
    """The plan of a run on one GPU: bfloat16, gradient checkpointing, the paper's Q&A setting."""
    config = model_config(model, WORK.max_length)
    with torch.device("meta"):
        dtype = torch.bfloat16 if way == "LoRA" else torch.float32
        policy: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if way == "LoRA":
            policy = get_peft_model(policy, LoraConfig(r=16, target_modules="all-linear"))
            for parameter in policy.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
            network = FeatureNetwork(policy)
        else:
            top = max(layer_indices((0.25, 0.5, 0.75), config.num_hidden_layers))
            network = FeatureNetwork(copy.deepcopy(decoder_up_to(policy.base_model, top)).to(torch.bfloat16))
    sizes = ("max_length", "context_length", "stride", "completion_length", "num_generations")
    settings = {name: getattr(WORK, name) for name in sizes}
    args = EBFTConfig("unused", bf16=True, use_cpu=True, gradient_checkpointing=True, report_to=[], **settings)
    return run_footprint(args, policy, network, None, device=torch.device("cuda"))


def operations_of_a_document(run: Footprint) -> float:
    """Floating-point operations of its part of an update."""
    return sum(operations(WORK.work(), run.method, run.policy, run.feature, run.checkpointing).values())


def measured_rate(way: str) -> float:
    """FLOP/s that one GPU reached over a whole update, of the operations counted."""
    model, seconds = MEASURED[way]
    return DOCUMENTS * operations_of_a_document(run_of(model, way)) / seconds


def need(model: str, way: str, gpus: int, machine: Machine) -> Need:
    """What a run needs on so many GPUs: DDP where that fits, else FSDP2."""
    documents = max(DOCUMENTS, gpus)
    of_a_gpu = documents // gpus
    for engine, gathers in (("ddp", False), ("fsdp2", True), ("fsdp2", False)):
        run = replace(run_of(model, way), processes=gpus, engine=engine, gathers=gathers, sampled=1)
        fits = min(AT_A_TIME, of_a_gpu, largest_batch(run, WORK.work(), machine.memory))
        if fits:
            break
    micro_batch = max((size for size in range(1, fits + 1) if of_a_gpu % size == 0), default=0)
    micro_batches = of_a_gpu // max(1, micro_batch)
    sampled = micro_batch
    while micro_batch and sampled < of_a_gpu and held(run, micro_batch, sampled + micro_batch) <= machine.memory:
        sampled += micro_batch
    sent = bytes_per_update(run, micro_batches, math.ceil(of_a_gpu / max(1, sampled)))["total"]
    link = machine.node if gpus <= GPUS_OF_A_NODE else machine.network
    compute = of_a_gpu * operations_of_a_document(run) / measured_rate(way)
    engine += ", gathered" if gathers else ""
    return Need(engine, documents, micro_batch, held(run, max(1, micro_batch), sampled), compute, sent / link)


def held(run: Footprint, micro_batch: int, sampled: int) -> float:
    """Bytes that a GPU holds at the worst moment."""
    return replace(run, sampled=sampled).memory(WORK.work(), micro_batch)["total"]


def table(machine: Machine) -> str:
    """All of it, in Markdown."""
    lines = [
        "| model | trained | GPUs | engine | GiB per GPU | documents per update (at a time) | computing, s "
        "| sending, s | hours per epoch, all hidden to none |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for way in MEASURED:
            for gpus in GPUS:
                row = need(model, way, gpus, machine)
                start = f"| {model} | {way} | {gpus} | {row.engine} | {row.held / GIB:.0f} |"
                if not row.micro_batch:
                    lines.append(f"{start} does not fit | | | |")
                    continue
                least, most = row.hours
                lines.append(
                    f"{start} {row.documents} ({row.micro_batch}) | {row.compute:.2f} | {row.send:.2f} "
                    f"| {least:.2f} to {most:.2f} |"
                )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--memory", type=float, default=80, help="GiB of a GPU")
    p.add_argument("--node", type=float, default=450, help="GB/s out of a GPU to those of its node")
    p.add_argument("--network", type=float, default=50, help="GB/s out of a GPU to other nodes")
    args = p.parse_args(argv)
    print(table(Machine(args.memory * GIB, args.node * 1e9, args.network * 1e9)))


if __name__ == "__main__":
    main()
