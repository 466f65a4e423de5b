"""One call of the model for everything: packed rows through the decoder, then whatever is to be read off.

DDP, FSDP, autocast and adapters all hang on the *outermost* module's call. So the innermost causal LM's `forward`
learns one more argument, `packed`, a function of the LM's two parts, and the outermost module is called with it (a
peft model and DDP pass it down). What the function returns is what the call returns.
Logits come from the model's own forward with its decoder replaced by given hidden states, so that logit scaling, soft
caps and biases are those of the model, whatever its family.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from . import plain
from .attention import NO_MASK, BlockCache, BlockPlan, enable_block_attention
from .families import reason_against_blocks

ORDINARY = "_ordinary_forward"  # the attribute that keeps the forward of a model we have taught another
OFFLOADER = "_offloader"  # of a decoder, what makes the context its forwards are run in (`offloading`)


@dataclass(frozen=True, eq=False)
class Head:
    """The model's own map from hidden rows [M, H] to logits [M, V]: its forward, with the decoder left out."""

    lm: PreTrainedModel
    output_type: type  # of the decoder; the causal LM's forward may ask it for any of its fields

    @property
    def vocab_size(self) -> int:
        """V, columns of the logits."""
        return self.lm.config.get_text_config().vocab_size

    def parameters(self, like: Tensor) -> list[Tensor]:
        """The trained parameters that logits depend on, whoever owns them: the leaves of one row's graph.

        Args:
            like: Any tensor [..., H] of the hidden states' type and device.
        """
        with torch.enable_grad():
            logits = self(like.new_zeros(1, like.shape[-1]))
        found: list[Tensor] = []
        seen, waiting = set(), [logits.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)  # of a node that adds up a leaf's gradients
            if leaf is not None:
                found.append(leaf)
            waiting += [following for following, _ in node.next_functions]
        return found

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits [M, V] of hidden rows [M, H]."""
        with _decoder_returning(self.lm.base_model, self.output_type(last_hidden_state=rows[None])):
            return vars(self.lm)[ORDINARY](inputs_embeds=rows[None], use_cache=False).logits.squeeze(0)


class Parts:
    """A causal LM in its two parts, decoder and head, to be run as often as needed within one call of the model."""

    head: Head  # known after the first call of `hidden`

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm

    def hidden(
        self, input_ids: Tensor, plan: BlockPlan, position_ids: Tensor, cache: BlockCache | None = None
    ) -> Tensor:
        """Last hidden states [B, T, H] of packed rows.

        Args:
            input_ids: LongTensor [B, T].
            plan: Who attends to whom.
            position_ids: LongTensor [B, T].
            cache: To read and extend, in sampling.
        """
        output = decode(self.lm.base_model, input_ids, plan, position_ids, cache)
        self.head = Head(self.lm, type(output))
        return output.last_hidden_state


def causal_lm(model: Any) -> PreTrainedModel:
    """The innermost `transformers` causal LM under DDP, accelerate and peft wrappers."""
    while hasattr(model, "module") and not isinstance(model, PreTrainedModel):
        model = model.module
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def install(model: nn.Module) -> PreTrainedModel:
    """Teach the causal LM inside `model` the argument `packed`; must come before any wrapping. Idempotent.

    Its ordinary forward, its weights and what it saves stay the same.
    """
    lm = causal_lm(model)
    if packs(lm):
        enable_block_attention(lm)
    if not _is_installed(lm):
        vars(lm).update({ORDINARY: lm.forward, "forward": MethodType(_forward_with_signature_of(type(lm)), lm)})
    return lm


def packs(model: Any) -> bool:
    """Whether rollouts can share their prefix in one row of this model; else each is a row of its own (`plain`)."""
    return reason_against_blocks(model.config) is None


def _is_installed(lm: PreTrainedModel) -> bool:
    own = vars(lm).get("forward")
    # Unpickled, a model we taught has its class's forward in place of ours.
    return ORDINARY in vars(lm) and own is not None and getattr(own, "__func__", own) is not type(lm).forward


def _forward_with_signature_of(model_class: type[PreTrainedModel]) -> Callable:
    """The taught forward under the class's own signature: `generate` reads off it what it may pass.

    Not `functools.wraps`: accelerate, when it unwraps a model, would follow `__wrapped__` past us.
    """

    def forward(lm: PreTrainedModel, *args, packed: Callable[[Parts], Any] | None = None, **kwargs):
        return vars(lm)[ORDINARY](*args, **kwargs) if packed is None else packed(Parts(lm))

    forward.__signature__ = inspect.signature(model_class.forward)
    return forward


def decode(
    decoder: nn.Module, input_ids: Tensor, plan: BlockPlan, position_ids: Tensor, cache: BlockCache | None = None
) -> Any:
    """Run the decoder (no LM head) over packed rows; `last_hidden_state` of its output is [B, T, H]."""
    if not packs(decoder):
        assert cache is None, "such models are sampled by `plain.generate`"
        return plain.decode(decoder, input_ids, plan.plain_rows(len(input_ids)))
    with vars(decoder).get(OFFLOADER, nullcontext)():
        return decoder(
            input_ids=input_ids,
            attention_mask=NO_MASK.to(input_ids.device),
            position_ids=position_ids.to(input_ids.device, non_blocking=True),
            past_key_values=cache,
            use_cache=cache is not None,
            block_plan=plan,
            block_cache=cache,
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
