"""Policy and feature network: what is supported, how they are loaded, and that block rollouts are right on them."""

import copy
import hashlib
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .attention import enable_block_attention
from .blocks import BlockLayout
from .features import FeatureNetwork, decoder_up_to, layer_indices
from .forward import causal_lm
from .logprobs import document_and_block_log_probs

# Families whose log-probs, features and gradients the tests hold against one run per rollout.
TESTED = frozenset(
    ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral")
    + ("mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2")
)
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Adapter initialisations that rewrite the base weights, so that switching the adapter off does not give the base back.
REWRITING_INITS = ("pissa", "olora", "corda", "loftq")


def check_config(config: PreTrainedConfig, max_length: int | None = None) -> None:
    """Refuse, from its config alone, a model on which block rollouts cannot be right.

    Args:
        config: Of the model.
        max_length: Longest document in tokens, to be checked against the model's positions.

    Raises:
        ValueError: Names the model type and the reason.
    """
    name = config.model_type
    text = config.get_text_config()
    reason = _reason_against(text)
    if reason:
        raise ValueError(f"model type '{name}' is not supported: {reason}. Tested types: {', '.join(sorted(TESTED))}.")
    positions = getattr(text, "max_position_embeddings", None)
    if max_length is None or positions is None:
        return
    if max_length > positions:
        raise ValueError(
            f"max_length={max_length} exceeds the model's {positions} positions: lower max_length to {positions}."
        )
    scaling = getattr(text, "rope_parameters", None) or {}
    kind, trained = scaling.get("rope_type"), scaling.get("original_max_position_embeddings")
    if kind in ("dynamic", "longrope") and trained and max_length > trained:
        raise ValueError(
            f"max_length={max_length}: beyond {trained} positions this model's '{kind}' rotary embedding depends on "
            f"the length of the run, which differs between blocks: lower max_length to {trained}."
        )


def _reason_against(config: PreTrainedConfig) -> str | None:
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and a block needs one causal sequence"
    if model_class is None:
        return "transformers has no causal language model for it"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its ALiBi biases depend on a token's place in the packed row, not on its position"
    if getattr(model_class, "_is_stateful", False):
        return "its state-space or recurrent layers carry a state through the row and cannot branch into blocks"
    if other:
        return f"its layers of type {', '.join(other)} cannot honour a block mask"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "its attention cannot be replaced through transformers' AttentionInterface"
    if config.model_type == "gpt_oss":
        return "its attention sinks are not in the block-parallel attention"
    if config.model_type not in TESTED and getattr(config, "sliding_window", None):
        return "it has a sliding window, which is tested per family only"
    return None


def verify_blocks(model: nn.Module) -> None:
    """Compare log-probs of packed blocks with one plain run per rollout, on a few random tokens of this very model.

    Run for families without a test of their own: unknown position schemes or hidden dependences between tokens show
    here.

    Raises:
        ValueError: The two differ by more than rounding.
    """
    lm = causal_lm(model)
    layout = BlockLayout(length=20, stride=6, context_length=3, completion_length=4)
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.config.get_text_config().vocab_size
    document = torch.randint(vocabulary, (1, layout.length), generator=generator).to(lm.device)
    tokens = torch.randint(vocabulary, (1, layout.num_blocks, 2, 4), generator=generator).to(lm.device)
    with torch.no_grad():
        packed = document_and_block_log_probs(model, document, tokens, layout).blocks[0]
        for k, anchor in enumerate(layout.anchors.tolist()):
            for n in range(2):
                alone = torch.cat([document[0, :anchor], tokens[0, k, n]])[None]
                logits = lm(input_ids=alone, use_cache=False).logits[0, anchor - 1 : -1].float()
                expected = logits.log_softmax(-1).gather(-1, tokens[0, k, n][:, None])[:, 0]
                error = (packed[k, n] - expected).abs().max().item()
                tolerance = 0.02 if lm.dtype == torch.float32 else 0.5
                if not error < tolerance:
                    raise ValueError(
                        f"model type '{lm.config.model_type}' is not supported: log-probs of packed blocks differ "
                        f"from those of a plain run by {error:.3g} nats. Tested types: {', '.join(sorted(TESTED))}."
                    )


def load_policy(model: str | nn.Module, args, peft_config=None, quantization_config=None) -> nn.Module:
    """The model to train: float32 trained weights, no dropout, block attention, adapters as asked for.

    Under `torch.device("meta")` this and the functions below make the same models without reading a weight: what a plan
    refuses is what training refuses.

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
    check_config(lm.config, args.max_length)
    enable_block_attention(lm)
    if lm.config.model_type not in TESTED and lm.device.type != "meta":
        verify_blocks(lm)
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(policy, "peft_config"):
            raise ValueError("peft_config: the model already has an adapter; pass one of the two.")
        policy = get_peft_model(policy, peft_config)
    _disable_dropout(policy)
    for parameter in policy.parameters():
        # Steps of 1e-6 are lost in bfloat16's rounding: what is trained is float32, whatever the checkpoint's dtype.
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return policy


def _from_pretrained(name: str, args, dtype: torch.dtype, quantization_config=None) -> PreTrainedModel:
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
    given = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if given not in (None, "auto", "float32", torch.float32):
        raise ValueError(
            f"dtype={given}: weights are trained in float32 (at learning rates near 1e-6 a half-precision weight does "
            "not move); remove it, and set bf16: true for fast half-precision forwards."
        )
    attention = kwargs.get("attn_implementation") or "sdpa"
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation='{attention}' cannot express block rollouts: use 'sdpa' (the default; "
            "block-parallel attention is used on top of it)."
        )
    config = load_config(name, **{k: kwargs[k] for k in ("revision", "trust_remote_code") if kwargs.get(k)})
    check_config(config, args.max_length)
    if "attn_implementation" not in kwargs and config.model_type == "gemma2":
        kwargs["attn_implementation"] = "eager"  # the only ordinary attention with its score cap
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return _read_weights(name, config, dtype, kwargs)


def _read_weights(name: str, config: PreTrainedConfig, dtype: torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    """`from_pretrained`; but under `torch.device("meta")` the model's shape alone, and nothing is read."""
    if torch.get_default_device().type != "meta":
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    options = {k: kwargs[k] for k in ("attn_implementation", "trust_remote_code") if k in kwargs}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def load_config(name: str, **kwargs) -> PreTrainedConfig:
    """A model's config by Hub name or path.

    Raises:
        ValueError: There is no such model.
    """
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path='{name}' is neither a local model folder nor a model on the Hub: {error}"
        ) from error


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the update must see the very distribution the rollouts were drawn from."""
    lora = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            lora = max(lora, module.p) if "lora_dropout" in name else lora
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout"):  # kept as plain numbers by some attention modules
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    if lora:
        warnings.warn(f"lora_dropout={lora} was set to 0: dropout would make the update off-policy.", stacklevel=3)


def check_adapters_off_is_base(model: nn.Module) -> None:
    """Refuse adapters whose switching off does not give the base model back.

    Raises:
        ValueError: Names the setting; the remedy is a separate feature network (and beta = 0).
    """
    for config in getattr(model, "peft_config", {}).values():
        bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
        rewriting = isinstance(init, str) and init.lower().startswith(REWRITING_INITS)
        if rewriting or bias not in ("none", None):
            setting = f"init_lora_weights='{init}'" if rewriting else f"bias='{bias}'"
            raise ValueError(
                f"{setting} changes the base weights, so the model without its adapter is not the base model: set "
                "feature_model_name_or_path (and beta: 0), or use plain LoRA."
            )


def load_feature_network(policy: nn.Module, args, source=None, processing_class=None) -> FeatureNetwork:
    """The frozen feature network: a given one, the policy's base with adapters off, or a copy of the policy.

    What is not shared with the policy is a copy that holds only the layers below the highest tap, in bfloat16 if the
    run uses it.

    Args:
        policy: As returned by `load_policy`, before any training.
        args: An `EBFTConfig`.
        source: Hub name, path, model or `FeatureNetwork` to use; the policy itself if None.
        processing_class: The policy's tokenizer, compared with that of a network given by name.

    Raises:
        ValueError: Another vocabulary, or adapters that change the base.
    """
    if isinstance(source, FeatureNetwork):
        return source
    options = {"pooling": args.pooling, "norm": args.feature_norm, "reduction": args.feature_reduction}
    if source is None and hasattr(policy, "peft_config"):
        check_adapters_off_is_base(policy)
        return FeatureNetwork(policy, args.feature_layers, **options)
    lm = causal_lm(policy if source is None or isinstance(source, str) else source)
    config = lm.config
    if isinstance(source, str):
        config = load_config(source, revision=args.feature_model_revision)
        check_config(config, args.max_length)
        check_same_vocabulary(config, source, lm.config, processing_class)
    elif source is not None:
        check_same_vocabulary(config, config._name_or_path or type(lm).__name__, causal_lm(policy).config)
    top = max(layer_indices(args.feature_layers, config.get_text_config().num_hidden_layers))
    if isinstance(source, str):
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        lm = _read_weights(source, config, dtype, {"revision": args.feature_model_revision})
    decoder = decoder_up_to(lm.base_model, top)
    decoder = copy.deepcopy(decoder).requires_grad_(False)
    return FeatureNetwork(decoder.to(torch.bfloat16) if args.bf16 else decoder, args.feature_layers, **options)


def describe_feature_network(network: FeatureNetwork) -> dict[str, Any]:
    """Name, revision and hash of the weights: what a run prints, stores, and compares on resume."""
    config = network.decoder.config
    name = getattr(config, "_name_or_path", "") or type(network.decoder).__name__
    return {"name": name, "revision": getattr(config, "_commit_hash", None), "sha256": weights_hash(network)}


def check_same_vocabulary(
    feature: PreTrainedConfig, name: str, policy: PreTrainedConfig, processing_class=None
) -> None:
    """Token ids must mean the same to both networks.

    Args:
        feature: Config of the feature network.
        name: Its name or path.
        policy: Config of the policy.
        processing_class: The policy's tokenizer, to be compared with that of `name`.

    Raises:
        ValueError: The tokenizers differ, or the sizes do where there are no two tokenizers to compare.
    """
    theirs, ours = feature.get_text_config().vocab_size, policy.get_text_config().vocab_size
    differs = theirs != ours
    if processing_class is not None:
        # Padded embedding tables differ in size within a family; what counts is the tokenizer. (A model may have been
        # saved without one: then the sizes decide.)
        with suppress(OSError, ValueError):
            differs = AutoTokenizer.from_pretrained(name).get_vocab() != processing_class.get_vocab()
    if differs:
        raise ValueError(
            f"feature_model_name_or_path='{name}' has another vocabulary ({theirs} tokens) than the policy ({ours}): "
            "use a feature network of the same model family."
        )


def load_reference(policy: nn.Module) -> nn.Module:
    """The initial policy, frozen, for the KL term: the policy itself (adapters off) with peft, else a copy."""
    if hasattr(policy, "peft_config"):
        check_adapters_off_is_base(policy)
        return policy
    return copy.deepcopy(policy).requires_grad_(False)


def weights_hash(network: FeatureNetwork) -> str:
    """SHA-256 over the names, shapes and values of a feature network's weights; adapters left out."""
    digest = hashlib.sha256()
    state = {k.replace(".base_layer", ""): v for k, v in network.decoder.state_dict().items() if ".lora_" not in k}
    for name in sorted(state):
        tensor: Tensor = state[name].detach().contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
