"""Loading the policy and, for a KL term, the initial one."""

import copy
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, set_seed

from ._compat import keep_4bit_weights_differentiable
from .families import TESTED
from .forward import causal_lm, install, packs
from .pickles import check_options
from .pretrained import attention_options, end_ids, load_config, read_weights
from .support import check_adapters_off_is_base, check_config, verify_blocks


def load_policy(model: str | nn.Module, args, peft_config=None, quantization_config=None) -> nn.Module:
    """The model to train: float32 trained weights, no dropout, block attention, adapters as asked for.

    Under `torch.device("meta")` this and the functions below make the same models without reading a weight: so a plan
    refuses what training refuses.

    Args:
        model: Hub name, path, causal LM or peft model.
        args: An `EBFTConfig`.
        peft_config: Adapter to add, or None.
        quantization_config: Passed to `from_pretrained` when `model` is a name.

    Raises:
        ValueError: The model, its attention, its dtype or the adapter is not supported; says what to do.
    """
    policy: Any = model
    if quantization_config is not None and peft_config is None:
        raise ValueError(
            "load_in_4bit, load_in_8bit or quantization_config without an adapter: weights of few bits cannot be "
            "trained; add use_peft: true (in Python peft_config)."
        )
    if isinstance(model, str):
        dtype = torch.bfloat16 if peft_config is not None and args.bf16 else torch.float32
        policy = _from_pretrained(model, args, dtype, quantization_config)
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs is for models given by name: apply it where you load the model.")
    lm = causal_lm(policy)
    if not isinstance(lm, PreTrainedModel):
        raise ValueError(
            f"model={type(lm).__name__} is not a transformers causal LM: pass a name, path or PreTrainedModel."
        )
    check_config(lm.config, args.max_length, args.longest_completion)
    if hasattr(policy, "peft_config") and not hasattr(policy, "disable_adapter"):
        raise ValueError(
            "model has an adapter from add_adapter: wrap it with peft.get_peft_model or pass peft_config."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"peft_config={type(peft_config).__name__}: prompt learning adds tokens to every row; use LoRA."
        )
    if args.packing and args.document_masking and not packs(lm):
        raise ValueError(
            f"packing=True: model type '{lm.config.model_type}' cannot keep the documents of a row apart; set "
            "packing: false (or document_masking: false, and they see each other)."
        )
    keep_4bit_weights_differentiable(lm)
    install(lm)  # before accelerate wraps the forward: autocast has to be around ours
    if packs(lm) and lm.config.model_type not in TESTED and lm.device.type != "meta":
        verify_blocks(lm)
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(policy, "peft_config"):
            raise ValueError("peft_config: the model already has an adapter; pass one of the two.")
        set_seed(args.seed)  # the adapter's random start is part of what the seed decides
        revision = (args.model_init_kwargs or {}).get("revision")  # else it would be loaded, and merged, with another
        policy = get_peft_model(policy, peft_config, revision=revision)
    _disable_dropout(policy)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError("model has no parameter with requires_grad=True: there is nothing to train.")
    for parameter in policy.parameters():
        # Steps of 1e-6 are lost in bfloat16's rounding: what is trained is float32, whatever the checkpoint's dtype.
        # So is what is frozen beside it, unless autocast or an adapter joins the two dtypes.
        joined = args.bf16 or hasattr(policy, "peft_config")
        if parameter.dtype in (torch.bfloat16, torch.float16) and (parameter.requires_grad or not joined):
            parameter.data = parameter.data.float()
    return policy


def default_learning_rate(policy: nn.Module) -> float:
    """What `learning_rate` is where it is not set."""
    return 1e-5 if hasattr(policy, "peft_config") else 1e-6


def check_named_policy(name: str, args) -> PreTrainedConfig:
    """Everything that can be said against a model given by name before its weights are read.

    Raises:
        ValueError: There is no such model, it would be read from a pickle, or its type, length, attention or dtype is
            not supported.
    """
    kwargs: dict[str, Any] = args.model_init_kwargs or {}
    check_options(kwargs)
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if dtype not in (None, "auto", "float32", torch.float32):
        raise ValueError(
            f"dtype={dtype}: weights are trained in float32 (at learning rates near 1e-6 a half-precision weight does "
            "not move); remove it, and set bf16: true for fast half-precision forwards."
        )
    attention = kwargs.get("attn_implementation") or "sdpa"
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation='{attention}' cannot express block rollouts: use 'sdpa' (the default; "
            "block-parallel attention is used on top of it)."
        )
    config = load_config(name, **{k: kwargs[k] for k in ("revision", "trust_remote_code") if kwargs.get(k)})
    check_config(config, args.max_length, args.longest_completion)
    return config


def _from_pretrained(name: str, args, dtype: torch.dtype, quantization_config=None) -> PreTrainedModel:
    config = check_named_policy(name, args)
    kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in ("dtype", "torch_dtype")}
    kwargs = attention_options(config) | kwargs
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return read_weights(name, config, dtype, kwargs)


def complete_stop_token_ids(args, model: str | nn.Module, processing_class) -> None:
    """Set `args.stop_token_ids`, if left open, to the EOS of the model (its generation config) and its tokenizer.

    Raises:
        ValueError: One of those given is no token.
    """
    if args.rollout == "blocks":
        return
    if args.stop_token_ids is not None:
        unknown = [i for i in args.stop_token_ids if processing_class.convert_ids_to_tokens(i) is None]
        if unknown:
            raise ValueError(
                f"stop_token_ids={args.stop_token_ids}: the tokenizer has no {unknown[0]}: give the ids of tokens "
                "that end a completion, or leave it unset for EOS."
            )
        return
    config: Any = None
    if not isinstance(model, str):
        config = causal_lm(model).generation_config
    else:
        with suppress(OSError):  # there need not be any
            revision = (args.model_init_kwargs or {}).get("revision") or "main"
            config = GenerationConfig.from_pretrained(model, revision=revision)
    args.stop_token_ids = end_ids(config, processing_class)


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the update must see the very distribution the rollouts were drawn from."""
    lora = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            lora = max(lora, module.p) if "lora_dropout" in name else lora
            module.p = 0.0
        for attribute, value in list(vars(module).items()):  # many modules keep a plain number instead
            if "drop" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    if lora:
        warnings.warn(f"lora_dropout={lora} was set to 0: dropout would make the update off-policy.", stacklevel=3)


def load_reference(policy: nn.Module, *, new_adapter: bool) -> nn.Module:
    """The initial policy, frozen, for the KL term.

    With a new adapter that is the policy itself with the adapter off; else a copy of the same dtype, so that the
    divergence of the policy from itself is 0.
    """
    if new_adapter:
        check_adapters_off_is_base(policy)
        return policy
    return copy.deepcopy(policy).requires_grad_(False)
