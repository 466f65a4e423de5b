"""What `planning` has to know of datasets and models, read off them; models may be on the meta device."""

import copy
import sys
from collections.abc import Iterable
from typing import Any

import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .attention import KEYS_PER_CHUNK, KEYS_PER_CHUNK_ON_CPU
from .config import EBFTConfig
from .data import BlockCollator
from .features import FeatureNetwork, layer_list
from .footprint import Footprint, Weights
from .forward import causal_lm
from .layouts import batch_layout
from .lm_head import FEWEST_ROWS, logits_per_chunk
from .planning import Documents, Method, Network, Work, limited

DOCUMENTS_AT_A_TIME = 64


def survey(rows, args: EBFTConfig, anchors: str) -> Documents:
    """Lay out the blocks of every document of a tokenised dataset, packed or not, and count.

    Args:
        rows: Of `prepare_datasets`.
        args: Sizes of blocks.
        anchors: `completion` or `all`.

    Returns:
        Sizes without blocks if rl_coef is 0.
    """
    collate, sizes, row_sizes = BlockCollator(0, args.document_masking), [], []
    starts = range(0, len(rows), DOCUMENTS_AT_A_TIME)
    for start in track(starts, "Counting blocks", console=Console(file=sys.stderr), transient=True):
        batch = collate([rows[i] for i in range(start, min(start + DOCUMENTS_AT_A_TIME, len(rows)))])
        layout = batch_layout(batch, args, anchors, step=None)
        counted = layout.valid.long()
        document = layout.doc_ids.gather(1, layout.anchors).clamp(min=0)  # type: ignore[union-attr]
        inside = batch["doc_ids"] >= 0
        zeros = torch.zeros_like(batch["document_ids"])
        columns = (
            zeros.scatter_add(1, batch["doc_ids"].clamp(min=0), inside.long()),
            zeros.scatter_add(1, document, counted),
            zeros.scatter_add(1, document, counted * (layout.anchors - layout.prefix_starts)),
        )
        for row in torch.stack(columns, dim=-1).tolist():
            found = [Work(P, K, prefixes, P * (P + 1) / 2) for P, K, prefixes in row if P]
            found = [limited(size, args.max_blocks if args.rl_coef else 0) for size in found]
            row_sizes.append(Work(*map(sum, zip(*found, strict=True))))
            sizes += found
    return Documents(sizes, row_sizes)


def longest_row(rows, args: EBFTConfig, anchors: str) -> Work:
    """Size of the longest row of a tokenised dataset: tokens, blocks and what goes with them."""
    longest, index, start = 0, 0, 0
    for batch in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        lengths = pc.list_value_length(batch["input_ids"]).to_pylist()  # type: ignore[attr-defined]
        if max(lengths) > longest:
            longest = max(lengths)
            index = start + lengths.index(longest)
        start += len(lengths)
    return survey([rows[index]], args, anchors).largest_row


def network_shape(decoder: nn.Module) -> Network:
    """The sizes of a decoder, or of one cut off at its top tap."""
    config: Any = decoder.config.get_text_config()  # type: ignore[union-attr]
    layers = layer_list(decoder)[1]
    heads, hidden = getattr(config, "num_attention_heads", 1), config.hidden_size  # of a state-space model none
    head_size = getattr(config, "head_dim", None) or hidden // heads
    used = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * hidden
    matrices = sum(_used_weights(p, used) for p in layers.parameters())
    return Network(
        layers=len(layers),
        hidden=hidden,
        queries=heads * head_size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        inner=inner * used,
        vocabulary=config.vocab_size,
        matrices=matrices,
    )


def _used_weights(parameter: nn.Parameter, experts_per_token: int) -> float:
    """Weights that one token is multiplied with; a stack of experts [E, ., .] is used in part, a vector is none."""
    if parameter.ndim < 2:
        return 0
    return parameter.numel() * (experts_per_token / len(parameter) if parameter.ndim == 3 else 1)


def trained_share(decoder: nn.Module) -> float:
    """Share of the layers' weights that need a gradient."""
    parameters = list(layer_list(decoder)[1].parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)


def decoder_of(network: Any) -> FeatureNetwork | None:
    """A feature network that is a decoder; None for any other."""
    return network if network is not None and network.layer_indices else None


def run_method(
    args: EBFTConfig,
    policy: nn.Module,
    network: FeatureNetwork | None,
    reference: nn.Module | None,
    device: torch.device,
    engine: str = "ddp",
) -> Method:
    """What of a run's settings decides the cost of a document; of a sentence encoder's nothing is known."""
    network = decoder_of(network)
    linear = reference is None or args.kl_estimator == "k1"
    plain = copy.copy(args)
    plain.gradient_checkpointing = plain.activation_checkpointing = False  # type: ignore[attr-defined]
    layers = 1 if network is None else network.decoder.config.get_text_config().num_hidden_layers  # type: ignore
    return Method(
        rollouts=args.num_generations,
        completion_length=args.rollout_length,
        reference=reference is not None,
        feature_depth=0 if network is None else max(network.layer_indices) / layers,
        trained=trained_share(causal_lm(policy).base_model),
        reuse=plain.reuses_sampling_forward_on(device) and linear and engine == "ddp",
        linear=linear,
    )


def run_footprint(
    args: EBFTConfig,
    policy: nn.Module,
    network: FeatureNetwork | None,
    reference: nn.Module | None,
    *,
    processes: int = 1,
    engine: str = "ddp",
    frozen: float | None = None,
    device: torch.device | None = None,
) -> Footprint:
    """What a run holds in memory.

    Args:
        args: Its settings.
        policy: The model to train.
        network: The feature network, or None.
        reference: The initial policy, or None.
        processes: How many train together.
        engine: How they share the run, as in `Footprint`.
        frozen: Bytes per frozen weight of the policy, where it is quantised; else None.
        device: Where it would run; by default the one of `args`.
    """
    lm, device, decoder = causal_lm(policy), device or args.device, decoder_of(network)
    config: Any = lm.config.get_text_config()
    window, capped = getattr(config, "sliding_window", None), getattr(config, "attn_logit_softcapping", None)
    keys_per_chunk = (KEYS_PER_CHUNK_ON_CPU if device.type == "cpu" else KEYS_PER_CHUNK) if capped else None
    flexes = device.type != "cpu" and not capped  # documents in the same call, without a mask in memory
    packed = args.packing and args.document_masking
    return Footprint(
        weights=weights_held(policy, network, reference, frozen),
        method=run_method(args, policy, network, reference, device, engine),
        policy=network_shape(lm.base_model),
        feature=None if decoder is None else network_shape(decoder.decoder),
        taps=1 if decoder is None else len(set(decoder.layer_indices)),
        bf16=bool(args.bf16),
        bf16_base=lm.dtype == torch.bfloat16,
        checkpointing=args.checkpoints_activations,
        offloading=args.activation_offloading,
        accumulates=args.gradient_accumulation_steps > 1,
        processes=processes,
        engine=engine,
        gathers=args.gather_for_sampling,
        sampled=args.rows_sampled_on(device),
        rows_per_chunk=max(FEWEST_ROWS, logits_per_chunk(device) // config.vocab_size),
        keys_per_chunk=keys_per_chunk,
        masked=not flexes and bool(packed or (window and window < args.max_length)),
        capped_heads=config.num_attention_heads if capped else 0,
    )


def weights_held(policy: nn.Module, network: FeatureNetwork | None, reference: nn.Module | None, frozen: float | None):
    """Bytes of the models; of the feature network and the reference only what they do not share with the policy.

    Args:
        policy: The model to train.
        network: The feature network, or None.
        reference: The initial policy, or None.
        frozen: Bytes per frozen weight of the policy, where it is quantised; else None.

    Returns:
        Bytes and counts for a `Footprint`.
    """
    parameters, layers = list(policy.parameters()), layer_list(causal_lm(policy).base_model)[1]
    trained = [p for p in parameters if p.requires_grad]
    held = _bytes(trained) + sum(p.numel() * (frozen or p.element_size()) for p in parameters if not p.requires_grad)
    return Weights(
        policy=held,
        trained=sum(p.numel() for p in trained),
        feature=0 if network is None or network.model is policy else _bytes(network.decoder.parameters()),
        reference=0 if reference is None or reference is policy else _bytes(reference.parameters()),
        head=_trained_head(causal_lm(policy)),
        layer=max(_bytes(x.parameters()) for x in layers),
        rest=_bytes(parameters) - sum(_bytes(x.parameters()) for x in layers),
    )


def _trained_head(lm: Any) -> int:
    weight = getattr(lm.get_output_embeddings(), "weight", None)
    return 0 if weight is None or not weight.requires_grad else weight.numel()


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
