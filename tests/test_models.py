"""Which models are supported, and what loading makes of them: float32 trained weights, no dropout, a sound phi."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    OPTForCausalLM,
    Phi3Config,
    Qwen2Config,
)

from ebft.config import EBFTConfig
from ebft.families import TESTED
from ebft.feature_models import load_feature_network, weights_hash
from ebft.features import FeatureNetwork
from ebft.logprobs import block_log_probs
from ebft.models import load_policy, load_reference
from ebft.pretrained import load_config, load_tokenizer
from ebft.support import check_adapters_off_is_base, check_config, check_tokenizer, verify_blocks
from ebft.text_features import TextFeatures
from ragged import ragged_batch, random_tokens
from test_logprobs import lora_model
from tiny import byte_bpe_tokenizer
from tiny_models import CONFIGS, SIZES, opt_config, tiny_model

INPUT_IDS, LAYOUT = ragged_batch()
TOKENS = random_tokens(LAYOUT, 3, 2)

REFUSED = {
    "Bloom": "ALiBi",
    "Mpt": "ALiBi",
    "Falcon": "AttentionInterface",
    "GPTJ": "AttentionInterface",
    "Mamba": "state-space",
    "Mamba2": "state-space",
    "Jamba": "state-space",
    "Rwkv": "state-space",
    "Qwen3Next": "state-space",
    "Zamba2": "state-space",
    "RecurrentGemma": "state-space",
    "MiniMax": "linear_attention",
    "GptOss": "attention sinks",
    "T5": "encoder-decoder",
    "Bart": "encoder-decoder",
    "Llama4Text": "chunked_attention",
    "Gemma3n": "sliding window",
    "Olmo3": "sliding window",
    "Bert": "it is an encoder",
    "ViT": "no causal language model",
}


@pytest.fixture
def args(tmp_path):
    def make(**settings) -> EBFTConfig:
        sizes = dict(max_length=64, stride=4, context_length=3, completion_length=4)
        return EBFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], **sizes | settings)

    return make


def saved(model, path, dtype=None) -> str:
    (model if dtype is None else model.to(dtype)).save_pretrained(path)
    return str(path)


# What is supported ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", REFUSED)
def test_refused_family(family):
    config = getattr(transformers, f"{family}Config")()
    with pytest.raises(
        ValueError, match=f"'{config.model_type}' is not supported: .*{REFUSED[family]}.*Tested types:"
    ):
        check_config(config)


def test_falcon_with_alibi_is_refused():
    with pytest.raises(ValueError, match="falcon.*ALiBi"):
        check_config(transformers.FalconConfig(alibi=True))


def test_tested_families_are_tested():
    assert {CONFIGS[family]().model_type for family in CONFIGS} == TESTED
    for family in CONFIGS:
        check_config(CONFIGS[family](), max_length=256)


def test_untested_family_with_a_window_is_refused():
    config = transformers.Starcoder2Config(sliding_window=16)
    check_config(config)
    config.model_type = "starcoder9"
    with pytest.raises(ValueError, match="starcoder9.*sliding window"):
        check_config(config)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma3"])
def test_verify_accepts(family):
    verify_blocks(tiny_model(family, dtype=torch.float32))


def test_verify_refuses_positions_counted_from_the_mask(args):
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config())
    check_config(model.config)
    with pytest.raises(ValueError, match="'opt' is not supported: log-probs of packed blocks differ"):
        verify_blocks(model)
    with pytest.raises(ValueError, match="'opt' is not supported"):
        load_policy(model, args())


def test_verify_refuses_attention_in_both_directions():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertLMHeadModel(BertConfig(**sizes, initializer_range=0.3)).eval()
    with pytest.raises(ValueError, match="'bert' is not supported"):
        verify_blocks(model)


def test_length_beyond_the_positions():
    check_config(Qwen2Config(**SIZES), max_length=256)
    with pytest.raises(ValueError, match="max_length=257 exceeds the model's 256 positions"):
        check_config(Qwen2Config(**SIZES), max_length=257)
    with pytest.raises(ValueError, match="max_length=257"):
        check_config(CONFIGS["gpt2"](), max_length=257)


def test_length_beyond_a_rotary_embedding_that_depends_on_it():
    factors = dict(long_factor=[1.0] * 4, short_factor=[1.0] * 4)
    rope = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=128, **factors)
    config = Phi3Config(**SIZES, original_max_position_embeddings=128, rope_parameters=rope)
    check_config(config, max_length=128)
    with pytest.raises(ValueError, match="max_length=129.*'longrope'.*lower max_length to 128"):
        check_config(config, max_length=129)


# Policy --------------------------------------------------------------------------------------------------------------


def test_half_precision_becomes_float32(args, tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    exact = {name: value.float() for name, value in model.state_dict().items()}
    path = saved(copy.deepcopy(model), tmp_path / "model")
    for policy in (load_policy(model, args()), load_policy(path, args())):
        assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.parameters())
        assert all(torch.equal(value, exact[name]) for name, value in policy.state_dict().items())
        assert policy.config._attn_implementation == "ebft_sdpa"


def test_adapters_are_float32_over_a_half_precision_base(args, tmp_path):
    path = saved(tiny_model(dtype=torch.bfloat16), tmp_path / "model")
    policy = load_policy(path, args(bf16=True), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_half_precision_is_refused(args, tmp_path, dtype, key):
    path = saved(tiny_model(), tmp_path / "model")
    with pytest.raises(ValueError, match="dtype=.*float16: weights are trained in float32.*bf16: true"):
        load_policy(path, args(model_init_kwargs={key: dtype}))


@pytest.mark.parametrize("dtype", ["auto", "float32", torch.float32])
def test_other_dtypes_are_float32(args, tmp_path, dtype):
    path = saved(tiny_model(dtype=torch.bfloat16), tmp_path / "model")
    policy = load_policy(path, args(model_init_kwargs=dict(dtype=dtype)))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_flash_attention_is_refused_before_any_weight_is_loaded(args):
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*use 'sdpa'"):
        load_policy("no/such/model", args(model_init_kwargs=dict(attn_implementation="flash_attention_2")))


def test_gemma2_gets_the_attention_with_its_cap(args, tmp_path):
    path = saved(tiny_model("gemma2"), tmp_path / "model")
    assert load_policy(path, args()).config._attn_implementation == "ebft_eager"


def test_unknown_name(args, tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path='.*nowhere' is neither"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="model_name_or_path"):
        load_policy(str(tmp_path / "nowhere"), args())


def test_not_a_causal_lm(args):
    with pytest.raises(ValueError, match="model=Linear is not a transformers causal LM"):
        load_policy(nn.Linear(2, 2), args())


def test_length_is_checked_before_any_weight_is_loaded(args, tmp_path):
    path = tmp_path / "model"
    Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"]).save_pretrained(path)  # no weights there at all
    with pytest.raises(ValueError, match="max_length=300 exceeds the model's 256 positions"):
        load_policy(str(path), args(max_length=300))


def test_model_init_kwargs_are_for_names(args):
    with pytest.raises(ValueError, match="model_init_kwargs"):
        load_policy(tiny_model(), args(model_init_kwargs=dict(revision="main")))


def test_two_adapters(args):
    with pytest.raises(ValueError, match="peft_config: the model already has an adapter"):
        load_policy(lora_model(), args(), LoraConfig(r=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "starcoder2"])
def test_dropout_is_set_to_0(args, family):
    """In training mode the policy must score a rollout as it was sampled."""
    dropouts = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, attention_dropout=0.5, hidden_dropout=0.5)
    dropouts |= dict(residual_dropout=0.5, embedding_dropout=0.5)
    config = CONFIGS[family]()
    noisy = tiny_model(family, **{name: value for name, value in dropouts.items() if hasattr(config, name)}).train()
    expected = block_log_probs(tiny_model(family), INPUT_IDS, TOKENS, LAYOUT)
    plain = copy.deepcopy(noisy)
    policy = load_policy(noisy, args()).train()
    assert torch.equal(block_log_probs(policy, INPUT_IDS, TOKENS, LAYOUT), expected)
    reference = policy(INPUT_IDS).logits
    assert torch.equal(reference, tiny_model(family)(INPUT_IDS).logits)
    assert not torch.equal(plain(INPUT_IDS).logits, reference), "the dropout was there before"


def test_lora_dropout_is_set_to_0_with_a_warning(args):
    adapter = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="lora_dropout=0.3 was set to 0"):
        policy = load_policy(tiny_model(dtype=torch.float32), args(), adapter)
    assert all(not m.p for m in policy.modules() if isinstance(m, nn.Dropout))


# Feature network and reference ---------------------------------------------------------------------------------------


def test_feature_network_is_a_frozen_copy(args):
    policy = load_policy(tiny_model(), args())
    phi = load_feature_network(policy, args(), None)
    expected = FeatureNetwork(tiny_model())(INPUT_IDS, TOKENS, LAYOUT)
    assert len(phi.decoder.layers) == 3
    assert all(not p.requires_grad for p in phi.decoder.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    before = weights_hash(phi)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert weights_hash(phi) == before
    assert all(torch.equal(a, b) for a, b in zip(phi(INPUT_IDS, TOKENS, LAYOUT), expected, strict=True))


def test_half_precision_is_that_of_from_pretrained(args, tmp_path):
    """Weights are rounded, rotary frequencies are not: far into a document those would be another position."""
    policy = load_policy(tiny_model(dtype=torch.float32), args())
    path = saved(tiny_model(dtype=torch.float32), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    expected = FeatureNetwork(loaded)(INPUT_IDS, TOKENS, LAYOUT)
    for phi in (load_feature_network(policy, args(bf16=True), source) for source in (None, path)):
        assert {p.dtype for p in phi.decoder.parameters()} == {torch.bfloat16}
        assert all(torch.equal(a, b) for a, b in zip(phi(INPUT_IDS, TOKENS, LAYOUT), expected, strict=True))
        assert torch.equal(phi.decoder.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_feature_network_by_name(args, tmp_path):
    path = saved(tiny_model(seed=1, dtype=torch.float32), tmp_path / "phi")
    options = dict(
        feature_layers=["1", "1.0"], pooling="mean_pooling", feature_norm="per_layer", feature_reduction="mean"
    )
    phi = load_feature_network(load_policy(tiny_model(), args()), args(**options), path)
    other = FeatureNetwork(tiny_model(seed=1, dtype=torch.float32), (1, 4), "mean_pooling", "per_layer", "mean")
    found, expected = (network(INPUT_IDS, TOKENS, LAYOUT) for network in (phi, other))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_vocabulary_is_refused(args, tmp_path):
    """Where there is no tokenizer to read text with."""
    path = saved(tiny_model(vocab_size=67), tmp_path / "phi")
    policy = load_policy(tiny_model(), args())
    with pytest.raises(ValueError, match=r"feature_model_name_or_path='.*phi' has another vocabulary \(67 .*\(61\)"):
        load_feature_network(policy, args(), path)


def test_vocabulary_is_that_of_the_tokenizer(args, tmp_path):
    """Equal sizes do not make equal vocabularies; padded embedding tables do not make different ones."""
    tokenizer, other = byte_bpe_tokenizer(), byte_bpe_tokenizer()
    policy = load_policy(tiny_model(vocab_size=320), args())
    padded = saved(tiny_model(vocab_size=384), tmp_path / "padded")
    tokenizer.save_pretrained(padded)
    load_feature_network(policy, args(), padded, tokenizer)
    strange = saved(tiny_model(vocab_size=320), tmp_path / "strange")
    other.add_tokens(["<another>"])
    other.save_pretrained(strange)
    assert isinstance(load_feature_network(policy, args(), strange, tokenizer), TextFeatures)


def adapted(**options):
    config = dict(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM") | options
    return get_peft_model(tiny_model(dtype=torch.float32), LoraConfig(**config))


@pytest.mark.parametrize(
    "options", [dict(), dict(use_rslora=True), dict(use_dora=True), dict(init_lora_weights="gaussian")]
)
def test_plain_adapters_are_their_own_phi(args, options):
    policy = load_policy(adapted(**options), args())
    assert load_reference(policy, new_adapter=True) is policy
    phi = load_feature_network(policy, args(), None)
    assert phi.model is policy
    assert weights_hash(phi) == weights_hash(FeatureNetwork(tiny_model(dtype=torch.float32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (dict(bias="all"), "bias='all'"),
        (dict(bias="lora_only"), "bias='lora_only'"),
    ],
)
def test_adapters_that_rewrite_the_base_are_refused_as_phi(args, tmp_path, options, message):
    policy = load_policy(adapted(**options), args())
    for load in (
        lambda: load_feature_network(policy, args(), None),
        lambda: load_reference(policy, new_adapter=True),
    ):
        with pytest.raises(ValueError, match=f"{message}.*set feature_model_name_or_path"):
            load()
    path = saved(tiny_model(dtype=torch.float32), tmp_path / "base")
    load_feature_network(policy, args(), path)


def test_check_of_adapters_without_any():
    check_adapters_off_is_base(tiny_model())


def test_reference_is_a_frozen_copy(args):
    policy = load_policy(tiny_model(), args())
    expected = block_log_probs(policy, INPUT_IDS, TOKENS, LAYOUT).detach()
    reference = load_reference(policy, new_adapter=False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    found = block_log_probs(reference, INPUT_IDS, TOKENS, LAYOUT)
    assert torch.equal(found, expected) and not found.requires_grad
    assert not torch.equal(block_log_probs(policy, INPUT_IDS, TOKENS, LAYOUT), expected)


def test_weights_hash():
    """Of every weight phi uses and of none above; the same in the model, a copy, and a model with adapters."""
    model = tiny_model()
    phi = FeatureNetwork(model)
    first = weights_hash(phi)
    assert weights_hash(FeatureNetwork(copy.deepcopy(model))) == first
    used = dict(phi.decoder.named_parameters())
    assert len(used) == 2 + 3 * 12  # embeddings, final norm, and the layers below the top tap
    for name, parameter in used.items():
        before = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1e-6
        assert weights_hash(phi) != first, name
        parameter.data.copy_(before)
    assert weights_hash(phi) == first
    for parameter in model.model.layers[3].parameters():
        parameter.data.zero_()
    assert weights_hash(phi) == first
    assert weights_hash(FeatureNetwork(model.to(torch.bfloat16))) != first


def test_weights_hash_leaves_adapters_out():
    model, expected = lora_model(), weights_hash(FeatureNetwork(tiny_model()))
    assert weights_hash(FeatureNetwork(model)) == expected
    assert weights_hash(FeatureNetwork(lora_model(seed=6))) == expected
    assert weights_hash(FeatureNetwork(model.merge_and_unload())) != expected


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    tokenizer = byte_bpe_tokenizer()
    check_tokenizer(tokenizer, tiny_model(vocab_size=len(tokenizer)).config)
    with pytest.raises(ValueError, match=f"processing_class has {len(tokenizer)} tokens and the model 61"):
        check_tokenizer(tokenizer, tiny_model().config)


def test_initial_policy_of_a_trained_adapter_keeps_the_adapter(args):
    """An adapter that was there before the run is part of the policy the run starts from."""
    policy = load_policy(lora_model(), args())
    expected = block_log_probs(policy, INPUT_IDS, TOKENS, LAYOUT).detach()
    reference = load_reference(policy, new_adapter=False)
    assert reference is not policy
    assert torch.allclose(block_log_probs(reference, INPUT_IDS, TOKENS, LAYOUT), expected)
    with policy.disable_adapter():
        assert not torch.allclose(block_log_probs(policy, INPUT_IDS, TOKENS, LAYOUT), expected)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_a_folder_without_tokenizer_files_is_refused(tmp_path, family):
    """Transformers makes a tokenizer of special tokens alone, or an error that names no model."""
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_name_or_path: {tmp_path} has no tokenizer .tokenizer.json"):
        load_tokenizer(str(tmp_path))
    byte_bpe_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(byte_bpe_tokenizer())
