"""The frozen feature network: hidden states at some depths, normalised and pooled.

The network runs over the document and its rollouts in one packed forward, stops at its highest tap, and has no LM
head. The reference block's features are read from the document's own tokens in the same forward.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, D features, L layers.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ._compat import with_child
from .attention import BlockPlan, block_attention
from .blocks import BlockLayout
from .forward import Parts, at_least_float32, causal_lm, decode, evaluation_mode, packs

POOLINGS = ("last_token", "mean_pooling", "concat", "token")
POOLINGS_OF_COMPLETIONS = POOLINGS[:2]  # the others need every rollout to be of one length
NORMS = ("joint", "per_layer", "none")
REDUCTIONS = ("concat", "mean")


class FeatureNetwork:
    """Feature map phi: `(input_ids, tokens, layout) -> (generated, reference)`.

    Never changes or freezes `model`: it only reads its weights, without gradient. With a peft model the adapters are
    off, so that the network is the base model.

    Args:
        model: A causal LM or decoder of `transformers`, or a peft model around one.
        layers: Which hidden states to read: fractions of the depth (`floor(f * L)`, at least 1) or integers
            into `hidden_states` (1..L; L is after the final norm, as in transformers).
        pooling: `last_token` of the block, `mean_pooling` over its G tokens, `concat` of all of them, or `token`: one
            feature per token.
        norm: `joint` L2 norm over the concatenated layers of a token, `per_layer` before concatenation, or `none`.
            Always before pooling, and not again after it.
        reduction: `concat` or `mean` over layers.

    Raises:
        ValueError: A name is unknown, or a layer is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[float | int] = (0.25, 0.5, 0.75),
        pooling: str = "last_token",
        norm: str = "joint",
        reduction: str = "concat",
    ):
        for name, value, allowed in (
            ("pooling", pooling, POOLINGS),
            ("feature_norm", norm, NORMS),
            ("feature_reduction", reduction, REDUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}='{value}' is unknown: use one of {', '.join(allowed)}.")
        self.model = model
        self.pooling, self.norm, self.reduction = pooling, norm, reduction
        lm = causal_lm(model)
        self.layer_indices = layer_indices(layers, lm.config.get_text_config().num_hidden_layers)
        self.decoder = decoder_up_to(lm.base_model, max(self.layer_indices))

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of the rollouts and of the reference blocks.

        Args:
            input_ids: LongTensor [B, P].
            tokens: LongTensor [B, K, N, G].
            layout: The blocks.
            lengths: LongTensor [B, K, N]: of rollouts that end; their last token and their mean are then taken of so
                many tokens, and the references' of `layout.reference_lengths`. Not with `concat` and `token`.

        Returns:
            generated [B, K, N, D] and reference [B, K, D] in float32 (float64 if the model is); with `pooling="token"`
            [B, K, G, N, D] and [B, K, G, D]. Rollouts of a group with equal tokens have equal features to the last
            bit: whitening would blow the rounding noise between them up into a direction of its own. Zeros where a
                block is not valid.
        """
        B, K, N, G = tokens.shape
        plan = BlockPlan(layout, B, N if K else 0, range(G), device=input_ids.device)
        ids = torch.cat([input_ids, tokens.flatten(1)], dim=1)
        taps = self._hidden_states(ids, plan, layout.position_ids(N).expand(B, -1))
        reference, valid = self._at_references(taps, layout)
        generated = [h[:, layout.length :].unflatten(1, (K, N, G)) for h in taps]
        if lengths is not None:
            generated = _share_equal_completions(self._until_ends(generated, lengths.clamp(min=1)), tokens)
            return where_valid(generated, valid), reference
        steps = self._pooled_steps(G)
        generated = self.token_features([h[:, :, :, steps] for h in generated])
        generated = self._pool(_share_equal_rollouts(generated, tokens, steps))
        if self.pooling == "token":
            generated = generated.transpose(2, 3)  # the group next to the features
        return where_valid(generated, valid), reference

    @torch.no_grad()
    def references(self, input_ids: Tensor, layout: BlockLayout) -> Tensor:
        """Features of the reference blocks alone, [B, K, D] or [B, K, G, D] as above: one forward of the documents."""
        B = len(input_ids)
        plan = BlockPlan(layout, B, 0, range(0), device=input_ids.device)
        taps = self._hidden_states(input_ids, plan, layout.position_ids(0).expand(B, -1))
        return self._at_references(taps, layout)[0]

    def with_pooling(self, pooling: str) -> "FeatureNetwork":
        """The same network with another pooling."""
        other = copy.copy(self)
        other.pooling = pooling
        return other

    def size(self, completion_length: int) -> int:
        """D, of blocks of so many tokens."""
        config: Any = self.decoder.config
        size = config.get_text_config().hidden_size
        size *= len(self.layer_indices) if self.reduction == "concat" else 1
        return size * completion_length if self.pooling == "concat" else size

    def _at_references(self, taps: list[Tensor], layout: BlockLayout) -> tuple[Tensor, Tensor]:
        """Features of the reference blocks, zeros where not valid, and which are valid."""
        B, device = len(taps[0]), taps[0].device
        anchors, valid, _ = (x.to(device) for x in layout.expand(B))
        lengths = layout.reference_lengths
        longest = layout.completion_length if lengths is None else int(lengths.max()) if lengths.numel() else 1
        within = torch.arange(longest, device=device)[self._pooled_steps(longest) if lengths is None else slice(None)]
        at = (anchors[..., None] + within).clamp(max=layout.length - 1)
        rows = torch.arange(B, device=device)[:, None, None]
        states = [h[:, : layout.length][rows, at] for h in taps]
        if lengths is None:
            features = self._pool(self.token_features(states))
        else:
            features = self._until_ends(states, lengths.to(device))
        return where_valid(features, valid), valid

    def _pooled_steps(self, completion_length: int) -> slice:
        """The tokens of a block that are pooled: only these are gathered."""
        return slice(completion_length - 1 if self.pooling == "last_token" else 0, completion_length)

    def _until_ends(self, taps: list[Tensor], lengths: Tensor) -> Tensor:
        """Pooled features of the first `lengths` [...] of some tokens [..., S, d]: [..., D]."""
        if self.pooling == "last_token":
            at = (lengths - 1)[..., None, None]
            last = [h.gather(-2, at.expand(*at.shape[:-1], h.shape[-1])).squeeze(-2) for h in taps]
            return self.token_features(last)
        features = self.token_features(taps)
        inside = torch.arange(features.shape[-2], device=features.device) < lengths[..., None]
        return features.where(inside[..., None], 0).sum(-2) / lengths[..., None]

    def _hidden_states(self, ids: Tensor, plan: BlockPlan, position_ids: Tensor) -> list[Tensor]:
        with ExitStack() as stack:
            lm = causal_lm(self.model)
            stack.enter_context(evaluation_mode(lm))
            stack.enter_context(adapters_off(self.model))
            pack = None
            if packs(lm):
                stack.enter_context(block_attention(lm))
            else:
                pack = plan.plain_rows(len(ids)).pack

            def run() -> Tensor:
                return decode(self.decoder, ids, plan, position_ids).last_hidden_state

            def read(parts: Parts | None = None) -> list[Tensor]:
                return tapped(self.decoder, self.layer_indices, run, pack)

            # Weights of a sharded policy that are not in its layers are there within a call of its root alone.
            return self.model(input_ids=ids, packed=read) if isinstance(self.model, FSDPModule) else read()

    def token_features(self, taps: list[Tensor]) -> Tensor:
        """Features of single tokens, before pooling: each layer's hidden states [..., d] -> [..., D]."""
        states = [at_least_float32(tap) for tap in taps]
        if self.norm == "per_layer":
            states = [nn.functional.normalize(h, dim=-1) for h in states]
        features = torch.cat(states, dim=-1) if self.reduction == "concat" else torch.stack(states).mean(0)
        return nn.functional.normalize(features, dim=-1) if self.norm == "joint" else features

    def _pool(self, features: Tensor) -> Tensor:
        """[..., tokens, D] -> [..., D], or as it is for per-token features."""
        if self.pooling == "token":
            return features
        return features.mean(-2) if self.pooling == "mean_pooling" else features.flatten(-2)


def layer_indices(layers: Sequence[Any], num_layers: int) -> list[int]:
    """Fractions of the depth or integers to indices into `hidden_states`, 1..L.

    Raises:
        ValueError: A fraction is outside (0, 1], or an integer outside 1..L.
    """
    indices = []
    for layer in layers:
        whole = isinstance(layer, int)
        index = layer if whole else max(1, math.floor(layer * num_layers)) if 0 < layer <= 1 else 0  # not of NaN
        if not 1 <= index <= num_layers:
            raise ValueError(
                f"feature_layers={list(layers)}: {layer} is out of range; use fractions in (0, 1] or integers in "
                f"1..{num_layers}, the number of layers of the feature network."
            )
        indices.append(index)
    if not indices:
        raise ValueError("feature_layers is empty: name at least one layer, e.g. 0.5.")
    return indices


def decoder_up_to(decoder: nn.Module, top: int) -> Any:
    """A view of `decoder` that stops after its first `top` layers; shares all weights, leaves `decoder` as it is."""
    name, layers = layer_list(decoder)
    return with_child(decoder, name, nn.ModuleList(list(layers)[:top]))


def layer_list(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and value of the attribute that holds the decoder's layers (`layers`, `h`, ...)."""
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList):
            return name, child
    raise ValueError(f"{type(decoder).__name__} has no list of layers: it cannot be the feature network.")


def tapped(decoder: Any, indices: list[int], run, pack=None) -> list[Tensor]:
    """Hidden states `hidden_states[i]` for each index while `run()` runs the decoder; `pack` orders their rows.

    Layer i's output is `hidden_states[i]`, but the last one of the whole network is taken after the final norm. Hooks,
    since `output_hidden_states` changed its meaning several times across transformers 5.
    """
    _, layers = layer_list(decoder)
    depth = decoder.config.get_text_config().num_hidden_layers
    taps: dict[int, Tensor] = {}

    def keep(index: int):
        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            taps[index] = pack(states) if pack else states

        return hook

    handles = [layers[i - 1].register_forward_hook(keep(i)) for i in set(indices) if i < depth]
    try:
        last = run()
    finally:
        for handle in handles:
            handle.remove()
    taps[depth] = last
    return [taps[i] for i in indices]


@contextmanager
def adapters_off(model: Any):
    """The base model inside a peft model; nothing to do for any other."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        yield


def _share_equal_rollouts(features: Tensor, tokens: Tensor, steps: slice) -> Tensor:
    """Give rollouts that agree up to a token that token's features from the first such rollout: [B, K, N, S, D]."""
    agree = (tokens[:, :, :, None] == tokens[:, :, None]).int().cumprod(-1)[..., steps]  # [B, K, N, N, S]
    first = agree.argmax(dim=3)  # [B, K, N, S]: the first rollout that agrees with rollout n up to s
    return features.gather(2, first[..., None].expand_as(features))


def _share_equal_completions(features: Tensor, tokens: Tensor) -> Tensor:
    """Give completions of equal tokens [B, K, N, G], zeros behind their ends, the features [B, K, N, D] of one."""
    agree = (tokens[:, :, :, None] == tokens[:, :, None]).all(-1)
    return features.gather(2, agree.int().argmax(3)[..., None].expand_as(features))


def where_valid(features: Tensor, valid: Tensor) -> Tensor:
    """Features [B, K, ...] of the valid blocks [B, K], and zeros for the others."""
    return features * valid[(..., *(None,) * (features.ndim - 2))]
