"""Whole completions of prompts by transformers' own generation, batched by length; prompts are token ids.

On a GPU the cache is static, which saves its growing; on a CPU it grows, so that short completions cost little.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedConfig

from ..forward import evaluation_mode
from ..plain import own_generation_config
from ..pretrained import end_ids
from .code_benchmarks import cut
from .diversity import until_end
from .settings import GenerationSettings

TOKENS_AT_A_TIME = 32_768  # of prompts and completions together, where the batch size does not say less


def check_room(
    prompts: Sequence[Sequence[int]], names: Sequence[str], config: PreTrainedConfig, max_new_tokens: int
) -> None:
    """Refuse prompts that with their completions exceed the model's positions.

    Raises:
        ValueError: Names the first such prompt.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    for prompt, name in zip(prompts, names, strict=True):
        if not prompt:
            raise ValueError(f"{name}: the prompt has no tokens.")
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"{name}: its prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed the model's "
                f"{positions} positions: lower max_new_tokens."
            )


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    stop: Sequence[tuple[str, ...]] | None = None,
    done: Sequence[bool] | None = None,
) -> Iterator[dict[int, list[str]]]:
    """Complete prompts, a batch at a time, longest first; many samples of one prompt in several parts.

    What a prompt's samples are depends on the settings and on all prompts, not on which of them are `done`.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        settings: How.
        stop: Strings of each prompt at which its completions end, without them.
        done: Prompts that need not be completed again.

    Yields:
        The samples of each prompt of a batch, by its index.

    Raises:
        ValueError: The model's logits are not finite.
    """
    stop = stop or [()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), stop[i], i))
    with evaluation_mode(model):
        for number, batch in enumerate(_batches(order, prompts, stop, settings)):
            if done is not None and all(done[i] for i in batch):
                continue
            torch.manual_seed(settings.seed * 1_000_003 + number)
            yield _complete_batch(model, tokenizer, {i: prompts[i] for i in batch}, stop[batch[0]], settings)


def _batches(order, prompts, stop, settings: GenerationSettings) -> Iterator[list[int]]:
    """Neighbours in `order` that end at the same strings and fit together."""
    batch: list[int] = []
    for i in order:
        if batch:
            rows = (len(batch) + 1) * settings.num_samples
            if rows > _rows_at_a_time(len(prompts[batch[0]]), settings) or stop[i] != stop[batch[0]]:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _rows_at_a_time(length: int, settings: GenerationSettings) -> int:
    """Completions that fit together behind prompts of at most `length` tokens."""
    return max(1, min(settings.batch_size, TOKENS_AT_A_TIME // (length + settings.max_new_tokens)))


def _complete_batch(
    model, tokenizer, prompts: dict[int, Sequence[int]], stop: tuple[str, ...], settings: GenerationSettings
) -> dict[int, list[str]]:
    device, length = model.device, max(map(len, prompts.values()))
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    rows = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts.values()]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()]
    options: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        options = dict(do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0)
    if device.type == "cuda":
        options["cache_implementation"] = "static"
    if stop:
        options |= dict(stop_strings=list(stop), tokenizer=tokenizer)
    ends = end_ids(model.generation_config, tokenizer)
    texts: dict[int, list[str]] = {i: [] for i in prompts}
    # A batch of several prompts has room for all of their samples.
    left, at_once = settings.num_samples, max(1, _rows_at_a_time(length, settings) // len(prompts))
    while left:
        n = min(left, at_once)
        with own_generation_config(model, ends, pad):
            found = model.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=settings.max_new_tokens,
                num_return_sequences=n,
                logits_processor=LogitsProcessorList([_finite_logits(model.config.name_or_path)]),
                **options,
            )
        new = found[:, length:].tolist()
        for row, (i, prompt) in enumerate(prompts.items()):
            texts[i] += [cut(text_behind(tokenizer, prompt, x, ends), stop) for x in new[row * n : row * n + n]]
        left -= n
    return texts


def _finite_logits(name: str) -> Any:
    """A logits processor that refuses NaN, of which a greedy token can be made as of any number."""

    def check(input_ids: Tensor, logits: Tensor) -> Tensor:
        if not (logits < torch.inf).all():  # below: top_p and temperature make -inf
            raise ValueError(f"{name or 'model'}: its logits are NaN or infinite: take another checkpoint.")
        return logits

    return check


def text_behind(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], ends: Sequence[int]) -> str:
    """The text of new tokens behind a prompt; decoded alone, some tokenizers drop a space in front.

    It ends before the first of `ends`, which need be no special token of the tokenizer.
    """
    tokens = until_end(tokens, ends)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([*prompt, *tokens], **options)[len(tokenizer.decode(prompt, **options)) :]
