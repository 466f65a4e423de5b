"""Which models block rollouts are right on, and which combinations cannot be: refused by name, with the reason."""

from contextlib import suppress

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig

from .blocks import BlockLayout
from .families import TESTED, reason_against, reason_against_blocks
from .forward import causal_lm
from .logprobs import document_and_block_log_probs

# Adapter initialisations that rewrite the base weights, so that switching the adapter off does not give the base back.
REWRITING_INITS = ("pissa", "olora", "corda", "loftq")


def check_config(config: PreTrainedConfig, max_length: int | None = None, completions: int | None = None) -> None:
    """Refuse, from its config alone, a model on which rollouts cannot be right.

    Args:
        config: Of the model.
        max_length: Longest document in tokens, to be checked against the model's positions.
        completions: Longest rollout of whole completions, for which any causal LM will do; None for blocks.

    Raises:
        ValueError: Names the model type and the reason.
    """
    reason, remedy = reason_against(config), ""
    if not reason and completions is None and (reason := reason_against_blocks(config)):
        remedy = " Any causal LM goes with rollout: completion."
    if reason:
        types = ", ".join(sorted(TESTED))
        raise ValueError(
            f"model type '{config.model_type}' is not supported: {reason}.{remedy} Tested types: {types}."
        )
    if max_length is not None:
        _check_positions(config.get_text_config(), max_length, completions or 0)


def _check_positions(config: PreTrainedConfig, max_length: int, completions: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    # A completion starts inside the document, wherever its prompt ends.
    needed = max_length + completions
    said = f"max_length={max_length}" + (f" and max_completion_length={completions} behind it" if completions else "")
    verb = "exceed" if completions else "exceeds"
    if needed > positions:
        raise ValueError(f"{said} {verb} the model's {positions} positions: {_shorter(positions, completions)}.")
    scaling = getattr(config, "rope_parameters", None) or {}
    kind, trained = scaling.get("rope_type"), scaling.get("original_max_position_embeddings")
    if kind in ("dynamic", "longrope") and trained and needed > trained:
        raise ValueError(
            f"{said}: beyond {trained} positions this model's '{kind}' rotary embedding depends on "
            f"the length of the run, which differs between rollouts: {_shorter(trained, completions)}."
        )


def _shorter(positions: int, completions: int) -> str:
    room = positions - completions
    return f"lower max_length to {room}" if room > 0 else f"lower max_completion_length, to less than {positions}"


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


def has_tokens(tokenizer) -> bool:
    """Whether there was a tokenizer to read: without files, transformers makes one of special tokens alone."""
    return bool(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys())


def same_vocabulary(feature: PreTrainedConfig, name: str, policy: PreTrainedConfig, processing_class=None) -> bool:
    """Whether token ids mean the same to both networks.

    Args:
        feature: Config of the feature network.
        name: Its name or path.
        policy: Config of the policy.
        processing_class: The policy's tokenizer, to be compared with that of `name`.
    """
    theirs, ours = feature.get_text_config().vocab_size, policy.get_text_config().vocab_size
    if theirs < ours:  # the policy could sample ids that it lacks
        return False
    if processing_class is not None:
        # Padded embedding tables differ in size within a family; what counts is the tokenizer. (A model may have been
        # saved without one: then the sizes decide.)
        with suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if has_tokens(tokenizer):
                return tokenizer.get_vocab() == processing_class.get_vocab()
    return theirs == ours


def check_same_vocabulary(
    feature: PreTrainedConfig, name: str, policy: PreTrainedConfig, processing_class=None
) -> None:
    """Refuse networks to which token ids do not mean the same; arguments as in `same_vocabulary`.

    Raises:
        ValueError: The tokenizers differ, or the sizes do where there are no two tokenizers to compare.
    """
    theirs, ours = feature.get_text_config().vocab_size, policy.get_text_config().vocab_size
    if theirs < ours:
        raise ValueError(
            f"feature_model_name_or_path='{name}' has {theirs} token embeddings and the policy {ours}: the policy can "
            "sample ids the feature network lacks; use one with at least as many."
        )
    if not same_vocabulary(feature, name, policy, processing_class):
        raise ValueError(
            f"feature_model_name_or_path='{name}' has another vocabulary ({theirs} tokens) than the policy ({ours}): "
            "use a feature network of the same model family."
        )


def check_tokenizer(processing_class, policy: PreTrainedConfig) -> None:
    """Every token id must have an embedding.

    Raises:
        ValueError: The tokenizer has more tokens than the model.
    """
    tokens, size = len(processing_class), policy.get_text_config().vocab_size
    if tokens > size:
        raise ValueError(
            f"processing_class has {tokens} tokens and the model {size}: pass the model's own tokenizer, or call "
            "model.resize_token_embeddings first."
        )
