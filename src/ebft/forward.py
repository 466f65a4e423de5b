"""One call of the model for everything: packed rows through the decoder, then whatever is to be read off.

DDP, FSDP, autocast and adapters all hang on the *outermost* module's call. So the innermost causal LM's `forward`
learns one more argument, `packed`, and the outermost module is called with it (a peft model and DDP pass it down).
Logits come from the model's own forward with its decoder replaced by given hidden states, so that logit scaling, soft
caps and biases are those of the model, whatever its family.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .attention import NO_MASK, BlockPlan, enable_block_attention

ORDINARY = "_ordinary_forward"  # the attribute that keeps the forward of a model we have taught another


@dataclass(frozen=True, eq=False)
class Head:
    """The model's own map from hidden rows [M, H] to logits [M, V]: its forward, with the decoder left out."""

    lm: PreTrainedModel
    output_type: type  # of the decoder; the causal LM's forward may ask it for any of its fields

    @property
    def vocab_size(self) -> int:
        """V, columns of the logits."""
        return self.lm.config.get_text_config().vocab_size

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits [M, V] of hidden rows [M, H]."""
        with _decoder_returning(self.lm.base_model, self.output_type(last_hidden_state=rows[None])):
            return vars(self.lm)[ORDINARY](inputs_embeds=rows[None], use_cache=False).logits[0]


@dataclass(frozen=True, eq=False)
class PackedForward:
    """What one packed forward does.

    Attributes:
        plan: Who attends to whom.
        position_ids: LongTensor [B, T].
        read: `read(hidden [B, T, H], head)` computes the call's result; `head` maps hidden rows to logits.
        past_key_values: Cache to read and extend, in sampling.
    """

    plan: BlockPlan
    position_ids: Tensor
    read: Callable[[Tensor, Head], Any]
    past_key_values: Cache | None = None


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The innermost `transformers` causal LM under DDP, accelerate and peft wrappers."""
    while hasattr(model, "module") and not isinstance(model, PreTrainedModel):
        model = model.module  # type: ignore[assignment]
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model  # type: ignore[return-value]


def install(model: nn.Module) -> PreTrainedModel:
    """Teach the causal LM inside `model` the argument `packed`; must come before any wrapping. Idempotent.

    Its ordinary forward, its weights and what it saves stay the same.
    """
    lm = causal_lm(model)
    enable_block_attention(lm)
    if not _is_installed(lm):
        vars(lm).update({ORDINARY: lm.forward, "forward": MethodType(_forward_with_signature_of(type(lm)), lm)})
    return lm


def _is_installed(lm: PreTrainedModel) -> bool:
    own = vars(lm).get("forward")
    # Unpickled, a model we taught has its class's forward in place of ours.
    return ORDINARY in vars(lm) and own is not None and getattr(own, "__func__", own) is not type(lm).forward


def _forward_with_signature_of(model_class: type[PreTrainedModel]) -> Callable:
    """`_forward` under the class's own signature: `generate` reads off it what it may pass, positions among it.

    Not `functools.wraps`: accelerate, when it unwraps a model, would follow `__wrapped__` past us.
    """

    def forward(lm: PreTrainedModel, *args, packed: PackedForward | None = None, **kwargs):
        return _forward(lm, *args, packed=packed, **kwargs)

    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    return forward


def _forward(lm: PreTrainedModel, *args, packed: PackedForward | None = None, **kwargs):
    if packed is None:
        return vars(lm)[ORDINARY](*args, **kwargs)
    input_ids = args[0] if args else kwargs["input_ids"]
    output = decode(lm.base_model, input_ids, packed.plan, packed.position_ids, packed.past_key_values)
    return packed.read(output.last_hidden_state, Head(lm, type(output)))


def decode(decoder: nn.Module, input_ids: Tensor, plan: BlockPlan, position_ids: Tensor, cache=None) -> Any:
    """Run the decoder (no LM head) over packed rows; `last_hidden_state` of its output is [B, T, H]."""
    return decoder(
        input_ids=input_ids,
        attention_mask=NO_MASK.to(input_ids.device),
        position_ids=position_ids.to(input_ids.device, non_blocking=True),
        past_key_values=cache,
        use_cache=cache is not None,
        block_plan=plan,
    )


@contextmanager
def _decoder_returning(decoder: nn.Module, output: ModelOutput):
    before = vars(decoder).get("forward")  # accelerate's hooks sit there
    vars(decoder)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del vars(decoder)["forward"]
        if before is not None:
            vars(decoder)["forward"] = before


def gathered_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """`hidden[b, index[b, m]]` for `hidden` [B, T, H] and `index` [B, M]: [B, M, H]."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


@contextmanager
def evaluation_mode(model: nn.Module):
    """No dropout and no activation checkpointing inside; every submodule's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
