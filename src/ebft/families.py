"""What a model's config says of it: can it be trained at all, and can its rows branch into blocks and rollouts?"""

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ._compat import attention_is_replaceable, is_stateful

# Families whose log-probs, features and gradients the tests hold against one run per rollout.
TESTED = frozenset(
    ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral")
    + ("mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2")
)
LAYER_TYPES = {"full_attention", "sliding_attention"}


def reason_against(config: PreTrainedConfig) -> str | None:
    """Why a model is no causal LM; None where it is."""
    config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and a rollout needs one causal sequence"
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is None:
        return "transformers has no causal language model for it"
    if config.model_type not in TESTED and getattr(config, "is_decoder", True) is False:
        return "it is an encoder: its tokens see what comes after them"
    return None


def reason_against_blocks(config: PreTrainedConfig) -> str | None:
    """Why rollouts cannot share a causal LM's prefix within one row; None where they can."""
    config = config.get_text_config()
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its ALiBi biases depend on a token's place in the packed row, not on its position"
    if is_stateful(model_class):
        return "its state-space or recurrent layers carry a state through the row and cannot branch into blocks"
    if other:
        return f"its layers of type {', '.join(other)} cannot honour a block mask"
    if not attention_is_replaceable(model_class):
        return "its attention cannot be replaced through transformers' AttentionInterface"
    if config.model_type == "gpt_oss":
        return "its attention sinks are not in the block-parallel attention"
    if config.model_type not in TESTED and getattr(config, "sliding_window", None):
        return "it has a sliding window, which is tested per family only"
    return None
