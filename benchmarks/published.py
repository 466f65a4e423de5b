"""The published scheme (arXiv 2603.12248), written plainly: the baseline that ours is measured against.

Every document is cloned N times; each clone carries one rollout per block. A sampling step is a forward over the
document and all blocks so far, without a cache; all attention goes through one dense mask; the feature network runs
through all its layers; the update computes the logits of every position. It is made as fast as the scheme allows: the
mask is built once without loops, sampling reads logits only where a token is drawn, rewards come from Gram matrices.

A clone's tokens are the document, then step 0 of all blocks, step 1 of all blocks, ...
Shape letters: B documents, C = B*N clones, K blocks, N rollouts, G generated tokens, P document tokens, T = P + K*G,
D features, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebft.blocks import BlockLayout
from ebft.features import adapters_off, layer_indices
from ebft.forward import at_least_float32, causal_lm
from ebft.planning import Method, Work


class Packing(NamedTuple):
    """`mask` BoolTensor [1, 1, T, T], True where the row's token attends to the column's; `position_ids` [1, T]."""

    mask: Tensor
    position_ids: Tensor


def pack(layout: BlockLayout, device: torch.device) -> Packing:
    """Mask and positions of a clone with all its blocks; the first P + K*t rows and columns are those of step t."""
    P, K, G = layout.length, layout.num_blocks, layout.completion_length
    anchors = layout.anchors.to(device)
    place = torch.arange(P + K * G, device=device)
    document = place[:P]
    sees = torch.cat([document + 1, anchors.repeat(G)])  # so many tokens of the document
    block = torch.cat([document.new_full((P,), -1), torch.arange(K, device=device).repeat(G)])
    own = (block[:, None] == block) & (block >= 0) & (place <= place[:, None])
    mask = own | ((place < sees[:, None]) & (place < P))
    steps = torch.arange(G, device=device).repeat_interleave(K)
    return Packing(mask[None, None], torch.cat([document, anchors.repeat(G) + steps])[None])


@torch.no_grad()
def sample(
    model: nn.Module, input_ids: Tensor, layout: BlockLayout, uniforms: Tensor, temperature: float = 1.0
) -> Tensor:
    """Tokens [B, K, N, G] by G forwards over everything so far; one uniform [B, K, N, G] per token."""
    lm: Any = causal_lm(model)
    B, K, N, G = uniforms.shape
    P, packing = layout.length, pack(layout, input_ids.device)
    anchors = layout.anchors.to(input_ids.device)
    ids, noise = input_ids.repeat_interleave(N, 0), uniforms.transpose(1, 2).flatten(0, 1)  # [C, P], [C, K, G]
    for step in range(G):
        hidden = lm.base_model(**_inputs(ids, packing), use_cache=False).last_hidden_state
        rows = hidden[:, -K:] if step else hidden[:, anchors - 1]
        logits = at_least_float32(lm.get_output_embeddings()(rows))  # [C, K, V]
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        below = (noise[..., step, None].to(cumulative) * cumulative[..., -1:]).contiguous()
        drawn = torch.searchsorted(cumulative, below, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
        ids = torch.cat([ids, drawn], dim=1)
    return ids[:, P:].view(B, N, G, K).permute(0, 3, 1, 2)


@torch.no_grad()
def features(
    model: nn.Module,
    input_ids: Tensor,
    tokens: Tensor,
    layout: BlockLayout,
    layers=(0.25, 0.5, 0.75),
    pooling="last_token",
) -> tuple[Tensor, Tensor]:
    """Features of the rollouts [B, K, N, D] and of the references [B, K, D], all layers run, joint norm."""
    lm = causal_lm(model)
    B, K, N, G = tokens.shape
    P, device = layout.length, input_ids.device
    ids = _cloned(input_ids, tokens)
    with adapters_off(model):
        output = lm.base_model(**_inputs(ids, pack(layout, device)), use_cache=False, output_hidden_states=True)
    taps = [output.hidden_states[i] for i in layer_indices(layers, lm.config.num_hidden_layers)]
    steps = torch.arange(G, device=device)[-1:] if pooling == "last_token" else torch.arange(G, device=device)

    def pooled(rows: list[Tensor]) -> Tensor:
        joined = torch.cat([at_least_float32(row) for row in rows], dim=-1)
        return nn.functional.normalize(joined, dim=-1).mean(-2)

    generated = pooled([tap[:, P:].unflatten(1, (G, K))[:, steps].transpose(1, 2) for tap in taps])  # [C, K, D]
    at = layout.anchors.to(device)[:, None] + steps
    reference = pooled([tap[::N][:, at] for tap in taps])  # any clone's document would do
    return generated.unflatten(0, (B, N)).transpose(1, 2), reference


def log_probs(
    model: nn.Module, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs, with gradient, of all clones' documents [C, P-1] and of the rollouts [B, K, N, G]; full logits."""
    B, K, N, G = tokens.shape
    P, anchors = layout.length, layout.anchors.to(input_ids.device)
    ids = _cloned(input_ids, tokens)
    logits = at_least_float32(model(**_inputs(ids, pack(layout, input_ids.device)), use_cache=False).logits)
    document = logits[:, : P - 1].log_softmax(-1).gather(-1, ids[:, 1:P, None])[..., 0]
    # Step 0 is predicted by the document before its block, step t by step t - 1: K places back.
    rows = torch.cat([logits[:, anchors - 1], logits[:, P:-K]], dim=1) / temperature
    blocks = rows.log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
    return document, blocks.view(B, N, G, K).permute(0, 3, 1, 2)


def token_forwards(work: Work, method: Method, checkpointing: bool = False) -> dict[str, float]:
    """Token-forwards of one document by stage, beside `ebft.planning.token_forwards`."""
    N, G = method.rollouts, method.completion_length
    packed = N * (work.tokens + work.blocks * G)
    sampling = N * sum(work.tokens + work.blocks * step for step in range(G))
    stages: dict[str, float] = {
        "sampling": sampling,
        "features": packed,
        "update": method.passes(checkpointing) * packed,
    }
    return stages | {"total": sum(stages.values())}


def _cloned(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Documents [B, P] and tokens [B, K, N, G] to clones [C, T]."""
    N = tokens.shape[2]
    generated = tokens.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)
    return torch.cat([input_ids.repeat_interleave(N, 0), generated], dim=1)


def _inputs(ids: Tensor, packing: Packing) -> dict[str, Tensor]:
    T = ids.shape[1]
    positions = packing.position_ids[:, :T].expand(len(ids), -1)
    return {"input_ids": ids, "attention_mask": packing.mask[..., :T, :T], "position_ids": positions}
