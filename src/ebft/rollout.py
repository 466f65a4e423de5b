"""Sampling, with or without the gradient: all rollouts of a document at once, from one prefill and one shared cache.

The document is run once; its keys and values serve all K*N rollouts. Then all rollouts advance together, a token at a
time. Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import plain
from .attention import BlockCache, BlockPlan
from .blocks import BlockLayout
from .forward import Head, Parts, at_least_float32, causal_lm, evaluation_mode, gathered_rows, install, packs
from .lm_head import Support, restrict, rows_per_chunk
from .logprobs import LogProbs, Rows
from .sharding import gathered, is_sharded, on_any_process

GROUP = 128  # neighbouring tokens that are searched together
STEPS_UNSEEN = 8  # between two looks at whether any rollout is still going on: each is a wait for the device
LOWEST = -1e4  # logit in place of -inf, where the probability is 0 anyway


class Rollouts(NamedTuple):
    """`tokens` [B, K, N, G]; `log_probs` and `entropy` [B, K, N, G] in nats, as sampled (temperature, support).

    Where rollouts end: `lengths` LongTensor [B, K, N], tokens up to the end, that one included, with zeros behind it;
    `clipped` BoolTensor [B, K, N], those without an end. None where all run on to G.
    """

    tokens: Tensor
    log_probs: Tensor
    entropy: Tensor
    lengths: Tensor | None = None
    clipped: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """BoolTensor [B, K, N, G]: what is not behind the end; None where nothing ends."""
        if self.lengths is None:
            return None
        return torch.arange(self.tokens.shape[-1], device=self.tokens.device) < self.lengths[..., None]

    def shortened(self) -> "Rollouts":
        """Without the last steps, at which none of them is still going on; one step at least."""
        if self.lengths is None or not self.lengths.numel():
            return self
        longest = max(1, int(self.lengths.max()))
        return self._replace(**{name: getattr(self, name)[..., :longest] for name in self._fields[:3]})


def sample_blocks(model: nn.Module, input_ids: Tensor, layout: BlockLayout, num_generations: int, **options) -> Tensor:
    """The tokens [B, K, N, G] of `sample_rollouts`, whose other options it takes; nothing else is computed."""
    return sample_rollouts(model, input_ids, layout, num_generations, statistics=False, **options).tokens


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
    statistics: bool = True,
    stop_token_ids: Sequence[int] = (),
    gather: bool = False,
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
        statistics: Whether log-probs and entropy are wanted; zeros if not.
        stop_token_ids: Ids behind which a rollout does not go on; without any it has G tokens.
        gather: Whether a model sharded by FSDP2 gathers its weights once, not at each token.

    Returns:
        Rollouts; zeros where a block is not valid. With `stop_token_ids` they have `lengths`, and no more steps than
        the longest needs.

    Raises:
        ValueError: A number is out of range.
    """
    uniforms = _prepared(input_ids, layout, num_generations, (temperature, top_k, top_p), generator, uniforms)

    def run(parts: Parts) -> Rollouts:
        support = (temperature, top_k, top_p)
        if not packs(parts.lm):
            return _generate(parts.lm, input_ids, layout, uniforms, support, stop_token_ids)
        return _decode(parts, input_ids, layout, uniforms, support, statistics, stop_token_ids)[0]

    install(model)
    with evaluation_mode(causal_lm(model)), gathered(model, gather):
        return model(input_ids=input_ids, packed=run)


def sample_and_sum(
    model: nn.Module,
    input_ids: Tensor,
    layout: BlockLayout,
    num_generations: int,
    weigh: Callable[[Rollouts], LogProbs],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    document_mask: Tensor | None = None,
) -> tuple[Tensor, LogProbs, Rollouts]:
    """`sample_rollouts` and then `document_and_block_loss` of them, in one forward instead of two.

    The policy does not change between sampling and its gradient, so the forward that draws the tokens can carry the
    gradient too; it is kept in memory until the backward, as any forward is. Activation checkpointing is off inside:
    it would run every step of the decoding again.

    Args:
        model: A causal LM, a peft model around one, or either wrapped by DDP; it is called once.
        input_ids: LongTensor [B, P].
        layout: The blocks; at least one.
        num_generations: N.
        weigh: Given the rollouts, the weights of all log-probs: those of `document_and_block_loss`.
        temperature: As in `sample_rollouts`; not 0.
        top_k: As there.
        top_p: As there.
        generator: As there.
        uniforms: As there.
        document_mask: As in `document_and_block_log_probs`.

    Returns:
        The weighted sum of the log-probs [] with gradient; the log-probs and the rollouts, without.

    Raises:
        ValueError: A number is out of range.
    """
    support = (temperature, top_k, top_p)
    uniforms = _prepared(input_ids, layout, num_generations, support, generator, uniforms)
    rows = Rows(layout, tuple(uniforms.shape), document_mask, input_ids.device)

    def run(parts: Parts) -> tuple[Tensor, LogProbs, Rollouts]:
        rollouts, hidden = _decode(parts, input_ids, layout, uniforms, support)
        with torch.no_grad():
            weights = weigh(rollouts)
        return *rows.weighted_sum(hidden, parts.head, input_ids, rollouts.tokens, weights, support), rollouts

    install(model)
    with evaluation_mode(causal_lm(model)):
        return model(input_ids=input_ids, packed=run)


def _prepared(input_ids, layout: BlockLayout, N: int, support: Support, generator, uniforms: Tensor | None) -> Tensor:
    """The noise [B, K, N, G] on the documents' device, once all numbers are found to be in range."""
    temperature, top_k, top_p = support
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative: use a positive one, or 0 for greedy tokens.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative: use 0 to keep all tokens.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 keeps all tokens.")
    if N < 1:
        raise ValueError(f"num_generations={N} must be at least 1.")
    if uniforms is None:
        uniforms = torch.rand(len(input_ids), layout.num_blocks, N, layout.completion_length, generator=generator)
    return uniforms.to(input_ids.device, non_blocking=True)


def _decode(
    parts: Parts,
    input_ids: Tensor,
    layout: BlockLayout,
    uniforms: Tensor,
    support: Support,
    statistics: bool = True,
    stop_token_ids: Sequence[int] = (),
) -> tuple[Rollouts, Tensor]:
    """Rollouts, and the hidden states [B, P + K*N*(G-1), H] that they and the documents went through."""
    (B, K, N, G), P, device = uniforms.shape, layout.length, input_ids.device
    cache = BlockCache()
    positions = layout.position_ids(1).expand(B, -1)
    anchors, valid, _ = (x.to(device, non_blocking=True) for x in layout.expand(B))

    document = parts.hidden(input_ids, BlockPlan(layout, B, 0, range(0), device=device), positions[:, :P], cache)
    before = gathered_rows(document, anchors - 1).flatten(0, 1)  # a row for all rollouts of a block
    drawn = [_draw(before, parts.head, uniforms[..., 0].flatten(0, 1), support, statistics)]
    hidden = []
    plan = BlockPlan(layout, B, N, range(-1, 0), decoding=True, device=device)
    for step in range(1, G if K else 1):
        if stop_token_ids and step % STEPS_UNSEEN == 0:
            going_on = _going_on([x[0] for x in drawn], valid, stop_token_ids)
            if not (on_any_process(going_on, device) if is_sharded(parts.lm) else going_on):
                break
        plan = plan.next_step()
        at = (positions[:, P::G] + step - 1).repeat_interleave(N, dim=1)
        hidden.append(parts.hidden(drawn[-1][0].view(B, K * N), plan, at, cache))
        noise = uniforms[..., step].flatten()[:, None]
        drawn.append(_draw(hidden[-1].flatten(0, 1), parts.head, noise, support, statistics))
    steps = (torch.stack([x.view(B, K, N) for x in kind], dim=-1) for kind in zip(*drawn, strict=True))
    if not K:
        lengths = input_ids.new_zeros(B, 0, N)
        rollouts = Rollouts(*(x.new_zeros(B, 0, N, G) for x in steps))
        return rollouts._replace(lengths=lengths, clipped=lengths.bool()) if stop_token_ids else rollouts, document
    rollouts = Rollouts(*(x * valid[..., None, None] for x in steps))
    rollouts = ended(rollouts, valid, stop_token_ids) if stop_token_ids else rollouts
    return rollouts, torch.cat([document, torch.stack(hidden, dim=2).flatten(1, 2)], dim=1) if hidden else document


def _generate(
    lm, input_ids: Tensor, layout: BlockLayout, uniforms: Tensor, support: Support, stop_token_ids: Sequence[int]
) -> Rollouts:
    """As `_decode`, of a model whose rollouts share nothing, by transformers' own generation."""
    shape, drawn = uniforms.shape, []
    valid = layout.expand(shape[0])[1].to(input_ids.device)

    def pick(logits: Tensor, step: int) -> Tensor:
        drawn.append(_draw_from(logits.clone(), uniforms[..., step].flatten()[:, None], support, True))
        return drawn[-1][0]

    if layout.num_blocks:
        plain.generate(lm, input_ids, layout, shape, stop_token_ids, pick, in_step=is_sharded(lm))
    else:
        drawn = [[input_ids.new_zeros(0, 1), *(torch.zeros(0, 1, device=input_ids.device),) * 2]]
    steps = (torch.stack([x.view(shape[:3]) for x in kind], dim=-1) for kind in zip(*drawn, strict=True))
    rollouts = Rollouts(*(x * valid[..., None, None] for x in steps))
    return ended(rollouts, valid, stop_token_ids) if stop_token_ids else rollouts


def ended(rollouts: Rollouts, valid: Tensor, stop_token_ids: Sequence[int]) -> Rollouts:
    """Rollouts cut behind the first of `stop_token_ids`, zeros behind it, as short as the longest of a valid block."""
    is_end = torch.isin(rollouts.tokens, torch.tensor(list(stop_token_ids), device=rollouts.tokens.device))
    went_on = (is_end.cumsum(-1) - is_end.long()) == 0  # no end before this token
    valid = valid[..., None]
    clipped = ~is_end.any(-1) & valid
    found = Rollouts(*(x.where(went_on, 0) for x in rollouts[:3]))
    return found._replace(lengths=went_on.sum(-1) * valid, clipped=clipped).shortened()


def _going_on(drawn: list[Tensor], valid: Tensor, stop_token_ids: Sequence[int]) -> bool:
    """Whether any rollout of a valid block has not ended; tokens [B*K, N] or [B*K*N, 1] of each step so far."""
    tokens = torch.stack([x.reshape(*valid.shape, -1) for x in drawn], dim=-1)  # [B, K, N, steps]
    over = torch.isin(tokens, torch.tensor(list(stop_token_ids), device=tokens.device)).any(-1)
    return bool((~over & valid[..., None]).any())


def _draw(rows: Tensor, head: Head, uniforms: Tensor, support: Support, statistics: bool) -> list[Tensor]:
    """Draw S tokens from each row of hidden states: rows [M, H], uniforms [M, S] -> tokens, log-probs, entropy [M, S].

    One uniform per token and a search in the cumulative distribution: `torch.multinomial` would draw noise for the
    whole vocabulary, which on a CPU costs as much as the rest of sampling. In place where it may be: another array of
    this size costs more than the passes over it.
    """
    parts = []
    size = rows_per_chunk(head, rows.device)
    for hidden, noise in zip(rows.split(size), uniforms.split(size), strict=True):
        # Not under no_grad: a cast of the head's weights that autocast keeps would have no graph for the update.
        parts.append(_draw_from(head(hidden.detach()).detach(), noise, support, statistics))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def _draw_from(logits: Tensor, noise: Tensor, support: Support, statistics: bool) -> list[Tensor]:
    """As `_draw`, from logits [M, V], in which it works: whoever keeps them sees them change."""
    temperature, top_k, top_p = support
    logits = at_least_float32(logits)
    if temperature not in (0, 1):
        logits = logits.div_(temperature)
    logits = restrict(logits, 1.0, top_k, top_p)
    tokens = logits.argmax(-1, keepdim=True).expand_as(noise) if temperature == 0 else None
    if not statistics:
        if tokens is None:
            tokens = _search(torch.softmax(logits, -1, out=logits), noise)
        return [tokens, *logits.new_zeros(noise.shape).expand(2, *noise.shape)]
    logits -= logits.amax(-1, keepdim=True)
    weights = logits.exp()
    normalizer, entropy = _normalizer_and_entropy(logits, weights, bool(top_k) or top_p < 1)
    tokens = _search(weights, noise) if tokens is None else tokens
    return [tokens, logits.gather(-1, tokens) - normalizer, entropy.expand_as(noise)]


def _search(weights: Tensor, noise: Tensor) -> Tensor:
    """The first token [M, S] whose cumulative weight exceeds the share `noise` [M, S] of its row of weights [M, V].

    In two steps, first among groups of tokens: a cumulative sum over all of them is slow on every device.
    """
    M, V = weights.shape
    whole = V - V % GROUP
    groups = weights[:, :whole].view(M, V // GROUP, GROUP).sum(-1)
    sums = torch.cat([groups, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)  # the last may be of no token
    group, rest = _first_above(sums, noise * sums.sum(-1, keepdim=True))
    tokens = group[..., None] * GROUP + torch.arange(GROUP, device=weights.device)  # [M, S, GROUP]
    inside = weights.gather(-1, tokens.clamp(max=V - 1).flatten(1)).view_as(tokens).where(tokens < V, 0.0)
    # Of weights that are no numbers the last group comes out, which may not be whole.
    return (group * GROUP + _first_above(inside, rest[..., None])[0][..., 0]).clamp(max=V - 1)


def _first_above(weights: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """The first column [..., S] whose cumulative weight [..., C] is above a height, and the height within it, >= 0."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    # Rounded up to the total, a height just below it would give the last column, however little weight that has.
    heights = heights.to(total).minimum(total.nextafter(torch.zeros_like(total)))
    at = torch.searchsorted(cumulative, heights, right=True).clamp(max=weights.shape[-1] - 1)
    # Below 0 by rounding, the height would give the first column within, however little weight that has.
    return at, (heights - cumulative.gather(-1, at) + weights.gather(-1, at)).clamp(min=0)


def _normalizer_and_entropy(logits: Tensor, weights: Tensor, restricted: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of logits [M, V] of which `weights` are the exponentials, and entropy of their softmax: [M, 1] each.

    The largest logit of each row is 0.
    """
    total = weights.sum(-1, keepdim=True)
    # Outside the support the weight is 0 and the logit not finite.
    finite = logits.clamp(min=LOWEST) if restricted else logits
    mean = (weights * finite).sum(-1, keepdim=True) / total  # not vecdot, which autocast would do in bfloat16
    return total.log(), (total.log() - mean).clamp(min=0)
