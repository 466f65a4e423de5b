"""Sampling: every block of every rollout of a document at once, from one prefill and one shared cache.

The document is run once; its keys and values serve all K*N rollouts. Then all rollouts advance together, a token at a
time. Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .attention import BlockPlan
from .blocks import BlockLayout
from .forward import Head, PackedForward, at_least_float32, causal_lm, evaluation_mode, gathered_rows, install
from .logprobs import restrict, rows_per_chunk


class Rollouts(NamedTuple):
    """`tokens` [B, K, N, G]; `log_probs` and `entropy` [B, K, N, G] in nats, as sampled (temperature, support)."""

    tokens: Tensor
    log_probs: Tensor
    entropy: Tensor


def sample_blocks(model: nn.Module, input_ids: Tensor, layout: BlockLayout, num_generations: int, **options) -> Tensor:
    """The tokens [B, K, N, G] of `sample_rollouts`, whose options it takes."""
    return sample_rollouts(model, input_ids, layout, num_generations, **options).tokens


@torch.no_grad()
def sample_rollouts(
    model: nn.Module,
    input_ids: Tensor,
    layout: BlockLayout,
    num_generations: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> Rollouts:
    """Sample N rollouts of every block, each as if from its own prefix alone.

    Args:
        model: A causal LM, a peft model around one, or either wrapped by DDP. Dropout is off inside.
        input_ids: LongTensor [B, P].
        layout: The blocks.
        num_generations: N.
        temperature: tau; 0 is greedy (then log-probs and entropy are those at temperature 1).
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens of at least this probability; 1 keeps all.
        generator: Source of the noise, on the CPU; torch's default one if None.
        uniforms: [B, K, N, G] in [0, 1), the noise itself instead: one number per token, so that a rollout can be made
            to depend on its document alone and not on its place in a batch.

    Returns:
        Rollouts; zeros where a block is not valid.

    Raises:
        ValueError: A number is out of range.
    """
    _check(temperature, top_k, top_p, num_generations)
    install(model)
    B, K, N, G = input_ids.shape[0], layout.num_blocks, num_generations, layout.completion_length
    device = input_ids.device
    if uniforms is None:
        uniforms = torch.rand(B, K, N, G, generator=generator)
    uniforms = uniforms.to(device)
    support = (temperature, top_k, top_p)
    cache = DynamicCache()  # without the config: sliding-window layers would drop keys that early anchors need

    def forward(ids: Tensor, plan: BlockPlan, positions: Tensor, read) -> Rollouts:
        packed = PackedForward(plan, positions.expand(B, -1), read, past_key_values=cache)
        return model(input_ids=ids, packed=packed)

    positions = layout.position_ids(1).expand(B, -1)
    document_positions, first_positions = positions[:, : layout.length], positions[:, layout.length :: G]
    anchors, valid, _ = (x.to(device) for x in layout.expand(B))

    def read_first(hidden: Tensor, head: Head) -> Rollouts:
        rows = gathered_rows(hidden, anchors - 1).flatten(0, 1)
        return Rollouts(*(x.view(B, K, N) for x in _draw(rows, head, uniforms[..., 0].flatten(0, 1), support)))

    def read_next(hidden: Tensor, head: Head, step: int) -> Rollouts:
        noise = uniforms[..., step].flatten()[:, None]
        return Rollouts(*(x.view(B, K, N) for x in _draw(hidden.flatten(0, 1), head, noise, support)))

    with evaluation_mode(causal_lm(model)):
        drawn = [forward(input_ids, BlockPlan(layout, B, 0, range(0), device=device), document_positions, read_first)]
        for step in range(1, G if K else 1):
            plan = BlockPlan(layout, B, N, range(step - 1, step), decoding=True, device=device)
            ids = drawn[-1].tokens.flatten(1)
            at = (first_positions + step - 1).repeat_interleave(N, dim=1)
            drawn.append(forward(ids, plan, at, lambda hidden, head, step=step: read_next(hidden, head, step)))
    if not K:
        return Rollouts(*(x.new_zeros(B, 0, N, G) for x in drawn[0]))
    return Rollouts(*(torch.stack(x, dim=-1) * valid[..., None, None] for x in zip(*drawn, strict=True)))


def _draw(rows: Tensor, head: Head, uniforms: Tensor, support: tuple[float, int, float]) -> list[Tensor]:
    """Draw S tokens from each row of hidden states: rows [M, H], uniforms [M, S] -> three [M, S].

    One uniform per token and a search in the cumulative distribution: `torch.multinomial` would draw noise for the
    whole vocabulary, which on a CPU costs as much as the rest of sampling.
    """
    temperature, top_k, top_p = support
    parts = []
    size = rows_per_chunk(head)
    for hidden, noise in zip(rows.split(size), uniforms.split(size), strict=True):
        logits = restrict(at_least_float32(head(hidden)), temperature or 1.0, top_k, top_p)
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True).expand_as(noise)
        else:
            cumulative = probs.cumsum(-1)
            total = cumulative[:, -1:]
            # Rounded up to the total, a number just below 1 would draw the last token, however unlikely that one is.
            below = (noise.to(total) * total).minimum(total.nextafter(torch.zeros_like(total)))
            tokens = torch.searchsorted(cumulative, below, right=True)
            tokens = tokens.clamp(max=logits.shape[-1] - 1)
        entropy = torch.special.entr(probs).sum(-1, keepdim=True).expand_as(noise)
        parts.append((tokens, log_probs.gather(-1, tokens), entropy))
    if not parts:
        return [uniforms.long(), uniforms.float(), uniforms.float()]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def _check(temperature: float, top_k: int, top_p: float, num_generations: int) -> None:
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative: use a positive one, or 0 for greedy tokens.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative: use 0 to keep all tokens.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 keeps all tokens.")
    if num_generations < 1:
        raise ValueError(f"num_generations={num_generations} must be at least 1.")
