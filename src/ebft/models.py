"""Loading the policy, the feature network and the initial policy; tokenizers and configs by name."""

import copy
import hashlib
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from ._compat import revision_of
from .families import TESTED, reason_against
from .features import FeatureNetwork, decoder_up_to, layer_indices
from .forward import causal_lm, install, packs
from .support import (
    check_adapters_off_is_base,
    check_config,
    check_same_vocabulary,
    has_tokens,
    same_vocabulary,
    verify_blocks,
)
from .text_features import DecoderReader, EncoderReader, TextFeatures, check_reads_text

MOST_TOKENS_OF_A_TEXT = 8192  # for a network of another vocabulary that does not say how many it takes


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
    install(lm)  # before accelerate wraps the forward: autocast has to be around ours
    if packs(lm) and lm.config.model_type not in TESTED and lm.device.type != "meta":
        verify_blocks(lm)
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(policy, "peft_config"):
            raise ValueError("peft_config: the model already has an adapter; pass one of the two.")
        set_seed(args.seed)  # the adapter's random start is part of what the seed decides
        policy = get_peft_model(policy, peft_config)
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
        ValueError: There is no such model, or its type, length, attention or dtype is not supported.
    """
    kwargs: dict[str, Any] = args.model_init_kwargs or {}
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


def check_named_feature_model(name: str, args, policy: PreTrainedConfig, processing_class) -> PreTrainedConfig:
    """Everything that can be said against a feature network given by name before its weights are read.

    Args:
        name: Hub name or path.
        args: An `EBFTConfig`.
        policy: Config of the policy.
        processing_class: The policy's tokenizer.

    Raises:
        ValueError: There is no such model, or its type, length or number of layers is not supported.
    """
    field = "feature_model_name_or_path"
    config = load_config(name, field, revision=args.feature_model_revision)
    encoder = is_encoder(config)
    try:
        if encoder or not same_vocabulary(config, name, policy, processing_class):
            if not (encoder or _has_tokenizer(name, args.feature_model_revision)):
                check_same_vocabulary(config, name, policy)
            check_reads_text(name, args.pooling, encoder)
        else:
            check_config(config, args.max_length, args.longest_completion)
        if not encoder:
            layer_indices(args.feature_layers, config.get_text_config().num_hidden_layers)
    except ValueError as error:
        text = str(error)
        raise error if field in text else ValueError(f"{field}='{name}': {text}") from error
    return config


def _has_tokenizer(name: str, revision: str | None) -> bool:
    try:
        load_tokenizer(name, revision)
    except ValueError:
        return False
    return True


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model has no causal decoder to read texts with, so that it is taken as a sentence encoder."""
    return reason_against(config) is not None


def _from_pretrained(name: str, args, dtype: torch.dtype, quantization_config=None) -> PreTrainedModel:
    config = check_named_policy(name, args)
    kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in ("dtype", "torch_dtype")}
    kwargs = attention_options(config) | kwargs
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return _read_weights(name, config, dtype, kwargs)


def attention_options(config: PreTrainedConfig) -> dict[str, Any]:
    """For `from_pretrained`: the ordinary attention that a family needs."""
    # The only one with its score cap.
    return {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}


def _read_weights(name: str, config: PreTrainedConfig, dtype: torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    """`from_pretrained`; but under `torch.device("meta")` the model's shape alone, and nothing is read."""
    if torch.get_default_device().type != "meta":
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    options = {k: kwargs[k] for k in ("attn_implementation", "trust_remote_code") if k in kwargs}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def load_config(name: str, field: str = "model_name_or_path", **kwargs) -> PreTrainedConfig:
    """A model's config by Hub name or path; `field` is what an error calls it.

    Raises:
        ValueError: There is no such model.
    """
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}='{name}' is neither a local model folder nor a model on the Hub: {error}"
        ) from error


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """A model's tokenizer by Hub name or path.

    Raises:
        ValueError: There is none.
    """
    if not name:
        raise ValueError("processing_class is missing: the model was built in code, so pass its tokenizer.")
    load_config(name, revision=revision)
    missing = (
        f"model_name_or_path: {name} has no tokenizer (tokenizer.json ...): copy it there, or pass processing_class"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{missing}. ({error})") from error
    if not has_tokens(tokenizer):
        raise ValueError(f"{missing}.")
    return tokenizer


def complete_stop_token_ids(args, model: str | nn.Module, processing_class) -> None:
    """Set `args.stop_token_ids`, if left open, to the EOS of the model (its generation config) and its tokenizer."""
    if args.rollout == "blocks" or args.stop_token_ids is not None:
        return
    config: Any = None
    if not isinstance(model, str):
        config = causal_lm(model).generation_config
    else:
        with suppress(OSError):  # there need not be any
            config = GenerationConfig.from_pretrained(model)
    args.stop_token_ids = end_ids(config, processing_class)


def end_ids(config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """EOS ids of a generation config and of a tokenizer, either of which may be None."""
    theirs = getattr(config, "eos_token_id", None)
    theirs = theirs if isinstance(theirs, list) else [theirs]
    return sorted({i for i in (*theirs, getattr(tokenizer, "eos_token_id", None)) if i is not None})


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


def load_feature_network(policy: nn.Module, args, source=None, processing_class=None) -> Any:
    """The frozen feature network: a given one, the policy's base with adapters off, or a copy of the policy.

    What is not shared with the policy is a copy that holds only the layers below the highest tap, in bfloat16 if the
    run uses it.

    Args:
        policy: As returned by `load_policy`, before any training.
        args: An `EBFTConfig`.
        source: Hub name, path, model or `FeatureNetwork` to use; the policy itself if None.
        processing_class: The policy's tokenizer, compared with that of a network given by name.

    Returns:
        A `FeatureNetwork`, or `TextFeatures` that stand in for one; None under `torch.device("meta")` for a sentence
        encoder, of whose cost nothing is known.

    Raises:
        ValueError: Another vocabulary, or adapters that change the base.
    """
    if isinstance(source, FeatureNetwork):
        return source
    options = {"pooling": args.pooling, "norm": args.feature_norm, "reduction": args.feature_reduction}
    if hasattr(policy, "peft_config") and source is None and args.feature_network != "random":
        if args.feature_network == "ema":
            raise ValueError(
                "feature_network='ema' averages trained weights, and an adapter's base is not trained: use pretrained."
            )
        check_adapters_off_is_base(policy)
        return FeatureNetwork(policy, args.feature_layers, **options)
    lm = causal_lm(policy if source is None or isinstance(source, str) else source)
    config = lm.config
    if isinstance(source, str):
        config = check_named_feature_model(source, args, lm.config, processing_class)
        if is_encoder(config):
            if torch.get_default_device().type == "meta":
                return None
            reader = EncoderReader(source, args.feature_model_revision, args.feature_norm)
            return TextFeatures(reader, processing_class, args.stop_token_ids or ())
    elif source is not None:
        check_same_vocabulary(config, config.name_or_path or type(lm).__name__, causal_lm(policy).config)
    top = max(layer_indices(args.feature_layers, config.get_text_config().num_hidden_layers))
    rounds = args.bf16 and args.feature_network != "ema"  # an average moves by less than bfloat16's rounding
    if args.feature_network == "random":
        lm = _untrained(config, args.seed)
    elif isinstance(source, str):
        dtype = torch.bfloat16 if rounds else torch.float32
        lm = _read_weights(source, config, dtype, {"revision": args.feature_model_revision})
    decoder = decoder_up_to(lm.base_model, top)
    decoder = copy.deepcopy(decoder).requires_grad_(False)
    network = FeatureNetwork(_to_bfloat16(decoder) if rounds else decoder, args.feature_layers, **options)
    if not isinstance(source, str) or same_vocabulary(config, source, causal_lm(policy).config, processing_class):
        return network
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS_OF_A_TEXT
    reader = DecoderReader(network, load_tokenizer(source, args.feature_model_revision), most)
    return TextFeatures(reader, processing_class, args.stop_token_ids or ())


def _untrained(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of that shape as it is before any training: a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, **attention_options(config))
    lm.config.name_or_path = f"{config.name_or_path or type(lm).__name__}, untrained, seed {seed}"
    return lm


def describe_feature_network(network: FeatureNetwork) -> dict[str, Any]:
    """What a run prints, stores, and compares on resume: the network, what is read off it, a hash of its weights."""
    config: Any = network.decoder.config
    return {
        "name": config.name_or_path or type(network.decoder).__name__,
        "revision": revision_of(config),
        "layers": ",".join(map(str, network.layer_indices)),
        "pooling": network.pooling,
        "norm": network.norm,
        "reduction": network.reduction,
        "dtype": str(next(network.decoder.parameters()).dtype).removeprefix("torch."),
        "sha256": weights_hash(network),
    }


def load_reference(policy: nn.Module, *, new_adapter: bool) -> nn.Module:
    """The initial policy, frozen, for the KL term.

    With a new adapter that is the policy itself with the adapter off; else a copy of the same dtype, so that the
    divergence of the policy from itself is 0.
    """
    if new_adapter:
        check_adapters_off_is_base(policy)
        return policy
    return copy.deepcopy(policy).requires_grad_(False)


def _to_bfloat16(model: nn.Module) -> nn.Module:
    """Weights to bfloat16, as `from_pretrained` does it: `Module.to` would round the rotary frequencies too."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def weights_hash(network: FeatureNetwork) -> str:
    """SHA-256 over the names, shapes and values of a feature network's weights; adapters left out."""
    digest = hashlib.sha256()
    state = {k.replace(".base_layer", ""): v for k, v in network.decoder.state_dict().items() if ".lora_" not in k}
    for name in sorted(state):
        tensor: Tensor = state[name].detach().contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
