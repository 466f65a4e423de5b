"""Loading the feature network: given, the policy's base, a copy, untrained, or of another vocabulary."""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ._compat import revision_of
from .families import reason_against
from .features import FeatureNetwork, decoder_up_to, layer_indices
from .forward import causal_lm
from .learned_features import LearnedFeatures
from .pretrained import attention_options, load_config, load_tokenizer, read_weights
from .support import check_adapters_off_is_base, check_config, check_same_vocabulary, same_vocabulary
from .text_features import DecoderReader, EncoderReader, TextFeatures, check_reads_text

MOST_TOKENS_OF_A_TEXT = 8192  # for a network of another vocabulary that does not say how many it takes


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
    if encoder and args.feature_network == "random":
        raise ValueError(
            f"{field}='{name}' is a sentence encoder, which feature_network='random' does not remake: name a decoder, "
            "or use pretrained or learned."
        )
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


def load_feature_network(policy: nn.Module, args, source=None, processing_class=None) -> Any:
    """The feature network: a given one, the policy's base with adapters off, or a copy; frozen, or learning on top.

    What is not shared with the policy is a copy that holds only the layers below the highest tap, in bfloat16 if the
    run uses it.

    Args:
        policy: As returned by `load_policy`, before any training.
        args: An `EBFTConfig`.
        source: Hub name, path, model or `FeatureNetwork` to use; the policy itself if None.
        processing_class: The policy's tokenizer, compared with that of a network given by name.

    Returns:
        A `FeatureNetwork`, or `TextFeatures` or `LearnedFeatures` that stand in for one; None under
        `torch.device("meta")` for a sentence encoder, of whose cost nothing is known.

    Raises:
        ValueError: Another vocabulary, or adapters that change the base.
    """
    network = _frozen_network(policy, args, source, processing_class)
    if args.feature_network == "learned" and network is not None:
        return LearnedFeatures(network, network.size(args.completion_length), args.seed)
    return network


def _frozen_network(policy: nn.Module, args, source, processing_class) -> Any:
    if source is not None and args.feature_network == "ema":
        raise ValueError("feature_model with feature_network='ema', which is the policy's own average: keep one.")
    if isinstance(source, FeatureNetwork):
        if args.feature_network == "random":
            raise ValueError(
                "feature_model is a FeatureNetwork, which feature_network='random' cannot remake: keep one."
            )
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
        options_of_it = {"revision": args.feature_model_revision}
        lm = read_weights(source, config, dtype, options_of_it, "feature_model_name_or_path")
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


def describe_feature_network(network: Any) -> dict[str, Any]:
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
    } | ({"learned": network.size(1)} if isinstance(network, LearnedFeatures) else {})


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
