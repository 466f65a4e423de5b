"""Tiny models of many families, built in code with random weights."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
)

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = 7  # of the models with sliding windows: shorter than the tests' prefixes

CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral_window": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: GPT2Config(
        vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "phi": lambda: PhiConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "granite": lambda: GraniteConfig(
        **SIZES, logits_scaling=8.0, attention_multiplier=0.2, residual_multiplier=0.3, embedding_multiplier=6.0
    ),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "smollm3": lambda: SmolLM3Config(**SIZES),
    "starcoder2": lambda: Starcoder2Config(**SIZES, sliding_window=None),
}
# Causal models whose rows cannot branch into rollouts, for their position biases, their states, or layers of both.
UNPACKED = {
    "bloom": lambda: BloomConfig(vocab_size=61, hidden_size=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2),
    "mamba": lambda: MambaConfig(
        vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=4, bos_token_id=1, eos_token_id=2
    ),
    "bamba": lambda: BambaConfig(
        **SIZES,
        attn_layer_indices=[2],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_chunk_size=8,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}
# There is no grouped matrix product in float64; state-space layers compute in float32.
FLOAT32_ONLY = ("mixtral", "qwen3_moe", "mamba", "bamba", "qwen3_next")


def opt_config() -> OPTConfig:
    """A family that passes every check of its config and is wrong all the same: it counts positions from the mask."""
    return OPTConfig(
        vocab_size=61,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
    )


def tiny_model(
    family: str = "qwen2", seed: int = 0, dtype=torch.float64, scale: float = 6.0, attention: str = "sdpa", **changes
) -> PreTrainedModel:
    """A model with weights large enough that its predictions are far from uniform; `changes` are to its config."""
    config = (CONFIGS | UNPACKED)[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    if family == "gemma2" or family in UNPACKED:
        attention = "eager"  # of gemma2 the only ordinary attention with its score cap
    if family in FLOAT32_ONLY and dtype == torch.float64:
        dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.to(dtype).eval()
