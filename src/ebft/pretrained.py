"""Configs, tokenizers and weights of causal LMs, by Hub name or path."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .pickles import SAFE, check_indices, check_weights_are_no_pickle
from .support import has_tokens


def attention_options(config: PreTrainedConfig) -> dict[str, Any]:
    """For `from_pretrained`: the ordinary attention that a family needs."""
    # The only one with its score cap.
    return {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}


def read_weights(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
    field: str = "model_name_or_path",
) -> PreTrainedModel:
    """`from_pretrained`; but under `torch.device("meta")` the model's shape alone, and nothing is read.

    Raises:
        ValueError: The weights are a pickle, or files of another folder; `field` is what the error calls the model.
    """
    kwargs = SAFE | kwargs
    if torch.get_default_device().type == "meta":
        options = {k: kwargs[k] for k in ("attn_implementation", "trust_remote_code") if k in kwargs}
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    check_indices(name, field)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    except OSError:
        check_weights_are_no_pickle(name, field)
        raise


def load_config(
    name: str, field: str = "model_name_or_path", trust_remote_code: bool = False, **kwargs
) -> PreTrainedConfig:
    """A model's config by Hub name or path; `field` is what an error calls it.

    Raises:
        ValueError: There is no such model, or it needs code of its own and is not trusted.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{field}='{name}' needs code of its own, which is not run: take a model that transformers has. For a "
                "model to train, `model_init_kwargs: {trust_remote_code: true}` runs it: read that code first."
            ) from error
        raise ValueError(
            f"{field}='{name}' is neither a local model folder nor a model on the Hub: {error}"
        ) from error


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer by Hub name or path.

    Raises:
        ValueError: There is none, or it needs code of its own and is not trusted.
    """
    if not name:
        raise ValueError("processing_class is missing: the model was built in code, so pass its tokenizer.")
    load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    missing = (
        f"model_name_or_path: {name} has no tokenizer (tokenizer.json ...): copy it there, or pass processing_class"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{missing}. ({error})") from error
    if not has_tokens(tokenizer):
        raise ValueError(f"{missing}.")
    return tokenizer


def load_policy_tokenizer(name: str, args: Any) -> Any:
    """The tokenizer of the model to train, of its revision, with code of its own if `model_init_kwargs` says so."""
    kwargs = args.model_init_kwargs or {}
    return load_tokenizer(name, kwargs.get("revision"), bool(kwargs.get("trust_remote_code")))


def end_ids(config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """EOS ids of a generation config and of a tokenizer, either of which may be None."""
    theirs = getattr(config, "eos_token_id", None)
    theirs = theirs if isinstance(theirs, list) else [theirs]
    return sorted({i for i in (*theirs, getattr(tokenizer, "eos_token_id", None)) if i is not None})
