"""The feature-matching reward for TRL's trainers: features, tokens, groups, and the gradient its baselines make."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel
from trl import SFTConfig

import oracles
from ebft import advantages
from ebft.completion_features import Completion, completion_features
from ebft.integrations.feature_network import load_network
from ebft.integrations.tokens import Tokens
from ebft.integrations.trl import FeatureMatchingReward
from ebft.integrations.trl_settings import leave_one_out_factors
from ebft.rewards import Rewards, feature_matching_rewards
from enumeration import flat_gradient
from test_logprobs import lora_model
from tiny import byte_bpe_tokenizer
from tiny_models import CONFIGS, FLOAT32_ONLY, tiny_model
from trl_setup import EOS, grpo_config, rloo_config, slow_features, word_model, word_reward, word_tokenizer

PROMPTS = ["a b"] * 3 + ["c a d e b"] * 3
REFERENCES = ["b c"] * 3 + ["a a a"] * 3
BERT = BertConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8)
COMPLETION_IDS = [[0, 1, EOS], [2, 2, 2, 2], [0, 1, EOS], [EOS], [1, 0, 5, 6], [6, EOS]]
CALL = {"prompts": PROMPTS, "completions": ["unread"] * 6, "completion_ids": COMPLETION_IDS}


def rows_of(lengths, vocabulary=61) -> list[Completion]:
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, vocabulary, (sum(pair),), generator=generator).tolist()) for pair in lengths]
    return [Completion(row[:prompt], row[prompt:]) for row, (prompt, _) in zip(ids, lengths, strict=True)]


def group_features(reward: FeatureMatchingReward, model, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of a group of `CALL` and of its reference, one run each."""
    words = word_tokenizer()
    prompt, reference = words(PROMPTS[start])["input_ids"], words(REFERENCES[start])["input_ids"]
    runs = [*COMPLETION_IDS[start : start + 3], [*reference, EOS]]
    features = [slow_features(model, prompt, ids, reward.network.pooling).numpy() for ids in runs]
    return np.stack(features[:-1]), features[-1]


# Features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CONFIGS, "bloom", "bamba"])
def test_features_are_those_of_a_run_alone(family):
    """Padding, batches and the cut above the highest tap change nothing; sliding windows are shorter than padding."""
    model, rows = tiny_model(family), rows_of([(9, 4), (2, 1), (12, 7), (1, 3), (3, 11)])
    network = load_network(model, word_tokenizer(), layers=(1, 0.75, 1.0), pooling="mean_pooling")
    found = completion_features(network, rows, batch_size=4)
    tolerance = 1e-4 if family in FLOAT32_ONLY else 1e-6
    for row, features in zip(rows, found, strict=True):
        expected = slow_features(model, *map(list, row), pooling="mean_pooling", layers=(1, 3, 4))
        torch.testing.assert_close(features.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pooling", ["last_token", "mean_pooling"])
@pytest.mark.parametrize("norm", ["joint", "per_layer", "none"])
def test_poolings_and_norms(pooling, norm):
    model, rows = tiny_model("gpt2"), rows_of([(3, 5), (7, 2)])
    network = load_network(model, word_tokenizer(), pooling=pooling, norm=norm)
    for row, features in zip(rows, completion_features(network, rows, 2), strict=True):
        expected = slow_features(model, *map(list, row), pooling=pooling, norm=norm)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_completions_have_equal_features_in_any_order(dtype):
    rows = rows_of([(4, 3), (9, 5), (2, 6), (30, 9)])
    rows += rows[:2]
    network, run = load_network(tiny_model(dtype=dtype), word_tokenizer(), norm="none"), []
    network.decoder.register_forward_hook(lambda module, args, output: run.append(len(output.last_hidden_state)))
    found = completion_features(network, rows, batch_size=3)
    assert run == [3, 1], "each is run once"
    assert torch.equal(found[4:], found[:2]) and not torch.equal(found[0], found[1])
    order = [5, 2, 0, 3, 4, 1]
    again = completion_features(network, [rows[i] for i in order], batch_size=2)
    assert torch.equal(again[0], again[5]) and torch.equal(again[2], again[4])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(again, found[order], rtol=0, atol=tolerance * found.abs().max().item())


def test_network_is_a_copy_that_stays_as_it_is():
    model = word_model(seed=1)
    reward = word_reward(feature_model=model)
    before = reward(**CALL, reference=REFERENCES)
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.zero_()
    assert reward(**CALL, reference=REFERENCES) == before
    assert not any(p.requires_grad for p in reward.network.decoder.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_network_by_name(tmp_path, bf16, dtype):
    model = word_model(seed=1, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    reward = word_reward(rloo_config(bf16=bf16), feature_model=str(tmp_path))
    assert {p.dtype for p in reward.network.decoder.parameters()} == {dtype}
    assert len(reward.network.decoder.layers) == 3
    expected = word_reward(feature_model=model)(**CALL, reference=REFERENCES)
    assert reward(**CALL, reference=REFERENCES) == pytest.approx(expected, abs=1e-5 if not bf16 else 0.1)


def test_network_by_name_has_the_policys_vocabulary(tmp_path):
    """Where a tokenizer was saved with it, token for token; else the sizes have to fit."""
    word_model(seed=1).save_pretrained(tmp_path)
    word_reward(feature_model=str(tmp_path))
    other = word_tokenizer()
    other.add_tokens("f")
    with pytest.raises(ValueError, match=r"another vocabulary \(8 tokens\) than processing_class \(9\)"):
        word_reward(feature_model=str(tmp_path), processing_class=other)
    word_tokenizer("a c b").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another vocabulary \(8 tokens\) than processing_class \(8\)"):
        word_reward(feature_model=str(tmp_path))


# Rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last_token", "mean_pooling"])
@pytest.mark.parametrize("whitening", ["none", "paper", "released"])
def test_rewards_are_those_of_the_equations(whitening, pooling):
    model = word_model(seed=1)
    reward = word_reward(
        feature_model=model, whitening=whitening, pooling=pooling, baseline="trainer", diversity_coef=0.5
    )
    found = reward(**CALL, reference=REFERENCES)
    for start in (0, 3):
        alignment, diversity = oracles.rewards(*group_features(reward, model, start), whitening)
        assert found[start : start + 3] == pytest.approx(alignment - 0.5 * diversity, abs=1e-6)


def test_metrics_are_of_the_unweighted_terms():
    model, logged = word_model(seed=1), {}
    reward = word_reward(feature_model=model, whitening="paper", alignment_coef=0.3, diversity_coef=0.7)
    reward(**CALL, reference=REFERENCES, log_metric=logged.__setitem__, trainer_state=None)
    groups = [group_features(reward, model, start) for start in (0, 3)]
    whitened = np.array([oracles.rewards(*group, "paper") for group in groups]).mean((0, 2))
    plain = np.array([oracles.rewards(*group) for group in groups]).mean((0, 2))
    expected = {
        "rewards/alignment/mean": whitened[0],
        "rewards/diversity/mean": whitened[1],
        "rewards/alignment_unwhitened/mean": plain[0],
        "rewards/diversity_unwhitened/mean": plain[1],
        "feature_matching_loss": np.mean([oracles.u_statistic(*group) for group in groups]),
        "completions/truncated_rate": 2 / 6,
        "references/truncated_rate": 0.0,
        "completions/duplicate_rate": 1 / 6,
    }
    assert logged == pytest.approx(expected, abs=1e-6)


def test_rows_without_a_reference_have_no_reward():
    whole, logged = word_reward()(**CALL, reference=REFERENCES), {}
    references = [None] * 3 + REFERENCES[3:]
    found = word_reward()(**CALL, reference=references)
    assert found[:3] == [None] * 3 and found[3:] == pytest.approx(whole[3:])
    assert word_reward()(**CALL, reference=[None] * 6, log_metric=logged.__setitem__) == [None] * 6
    assert not logged


# Tokens of references ------------------------------------------------------------------------------------------------


def test_references_of_text():
    tokenizer = byte_bpe_tokenizer()
    tokens, eos = Tokens(tokenizer), tokenizer.eos_token_id
    ids = lambda text: tuple(tokenizer(text)["input_ids"])  # noqa: E731
    prompt, together = ids("the quick"), ids("the quick brown fox")
    assert tokens.prompt("the quick") == prompt == together[: len(prompt)]
    assert tokens.reference("the quick", " brown fox", "row") == (*together[len(prompt) :], eos)
    # Together "quick " and "brown" are other tokens than the prompt alone: the context stays that of the completions.
    assert ids("the quick ") != ids("the quick brown")[: len(ids("the quick "))]
    assert tokens.reference("the quick ", "brown", "row") == (*ids("brown"), eos)
    assert tokens.reference("a", f"b{tokenizer.eos_token}", "row") == (*ids("b"), eos)
    assert (
        Tokens(tokenizer, max_completion_length=3).reference("a", " the dog sleeps.", "row")
        == ids(" the dog sleeps.")[:3]
    )
    assert tokens.is_whole((5, eos)) and not tokens.is_whole((eos, 5)) and not tokens.is_whole(())


def test_references_of_text_do_not_start_a_text():
    """Tokenizers that put a space before a text would put one between prompt and reference."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokens = Tokens(tokenizer)
    assert (
        tokenizer.decode([*tokens.prompt("x ="), *tokens.reference("x =", "2", "row")])
        == f" x =2{tokenizer.eos_token}"
    )


def test_references_of_messages():
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    tokenizer.eos_token = "<|im_end|>"
    tokens, prompt = Tokens(tokenizer), [{"role": "user", "content": "what is two and two?"}]
    rendered = "<|im_start|>user\nwhat is two and two?<|im_end|>\n<|im_start|>assistant\n"
    ids = lambda text: tuple(tokenizer(text)["input_ids"])  # noqa: E731
    assert tokens.prompt(prompt) == ids(rendered)
    answer = [{"role": "assistant", "content": "four"}]
    assert tokens.reference(prompt, answer, "row") == ids("four<|im_end|>")
    assert tokens.reference(prompt, [*answer, *prompt], "row") == ids("four<|im_end|>"), "one turn, as it is sampled"
    assert tokens.reference(prompt, "four", "row") == ids("four<|im_end|>")


def test_references_where_the_template_drops_the_generation_prompt():
    """Some templates end the generation prompt with what a full conversation has not."""
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\n##' + extra }}")
    tokens = Tokens(tokenizer, {"extra": "!"})
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "four"}]
    ids = lambda text: tuple(tokenizer(text)["input_ids"])  # noqa: E731
    assert tokens.prompt(prompt)[-3:] == ids("##!")
    assert tokens.reference(prompt, answer, "row") == (*ids("four<|im_end|>\n"), tokenizer.eos_token_id)


# Baselines -----------------------------------------------------------------------------------------------------------


def of_trainer(rewards: Tensor, kind: str) -> Tensor:
    """Advantages [..., n] as the trainers make them of rewards."""
    return advantages.rloo(rewards) if kind == "rloo" else rewards - rewards.mean(-1, keepdim=True)


CONFIGS_OF = {"rloo": rloo_config, "grpo": grpo_config}


@pytest.mark.parametrize("kind", CONFIGS_OF)
@pytest.mark.parametrize("n", [3, 4, 7])
def test_trainers_make_leave_one_out_advantages_of_the_rewards(kind, n):
    """Exactly, group by group, word for word eq 94."""
    ids = [[(i * 5 + j * j) % 3 for j in range(1 + i % 4)] for i in range(n)]
    model, args = word_model(seed=1), CONFIGS_OF[kind](num_generations=n, per_device_train_batch_size=n)
    reward = word_reward(args, feature_model=model, alignment_coef=0.8, diversity_coef=0.6)
    found = reward(["a b"] * n, [""] * n, ids, reference=["c"] * n)
    X = np.stack([slow_features(model, [0, 1], row).numpy() for row in ids])
    y = slow_features(model, [0, 1], [2, EOS]).numpy()
    expected = oracles.leave_one_out_advantage(X, y, 0.8, 0.6)
    assert of_trainer(torch.tensor(found, dtype=torch.float64), kind).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", CONFIGS_OF)
@pytest.mark.parametrize("whitening", ["none", "paper", "released"])
def test_advantages_are_those_of_our_own_trainer(kind, whitening):
    generator = torch.Generator().manual_seed(0)
    gen = torch.randn(50, 4, 6, generator=generator, dtype=torch.float64)
    ref = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    coefs = {"alignment_coef": 0.8, "diversity_coef": 0.6}
    ours = advantages.leave_one_out(feature_matching_rewards(gen, ref, whitening=whitening, **coefs), **coefs)
    factors = leave_one_out_factors(4, rloo=kind == "rloo")
    scaled = {name: coef * factor for (name, coef), factor in zip(coefs.items(), factors, strict=True)}
    returned = feature_matching_rewards(gen, ref, whitening=whitening, **scaled).total
    torch.testing.assert_close(of_trainer(returned, kind), ours, rtol=0, atol=1e-10)


def test_no_centred_rewards_give_leave_one_out_for_two():
    """Its advantages do not sum to zero, as those of every trainer that subtracts a mean of rewards do."""
    two = Rewards(torch.tensor([0.1, -0.2]), torch.tensor([0.7, 0.4]), torch.tensor([0.6, 0.6]))
    assert advantages.leave_one_out(two).sum().item() == pytest.approx(-1.2)
    for kind in CONFIGS_OF:
        assert of_trainer(torch.tensor([0.3, 0.9]), kind).sum().item() == pytest.approx(0.0, abs=1e-6)


COMPLETIONS = [[EOS], *([a, b] for a, b in itertools.product((0, 1, 2), (0, 1, 2, EOS)))]


def enumerated_policy() -> tuple[list[Tensor], Tensor]:
    """Logits of the first word and of the second given the first, and the 13 completions' log-probs."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(*shape, 4, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((), (4,))
    ]
    first, second = (p.log_softmax(-1) for p in params)
    log_probs = [first[ids[0]] + (second[ids[0], ids[1]] if len(ids) > 1 else 0.0) for ids in COMPLETIONS]
    return params, torch.stack(log_probs)


def mean_and_exact_gradient(
    kind: str, n: int, alignment_coef: float, diversity_coef: float, exact_diversity_coef: float, baseline: str
) -> tuple[Tensor, Tensor]:
    """Expected gradient of -A log p, completions rewarded by the reward itself, and that of a loss in closed form.

    All completions of up to two words, EOS included, and all groups of n of them: there is no sampling noise.
    """
    model, args = word_model(seed=1), CONFIGS_OF[kind](num_generations=n, per_device_train_batch_size=n)
    options = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef, "baseline": baseline}
    params, log_probs = enumerated_policy()
    groups = oracles.groups(len(COMPLETIONS), n)
    weights = log_probs.detach()[groups].sum(-1).exp()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    ids = [COMPLETIONS[i] for i in groups.flatten().tolist()]
    texts = [""] * len(ids)
    rewards = word_reward(args, feature_model=model, **options)(
        ["a b"] * len(ids), texts, ids, reference=["c a"] * len(ids)
    )
    values = of_trainer(torch.tensor(rewards, dtype=torch.float64).view(-1, n), kind)
    mean = flat_gradient(-(weights[:, None] * values * log_probs[groups]).sum() / n, params)

    phi = torch.stack([slow_features(model, [0, 1], completion) for completion in COMPLETIONS])
    ref = slow_features(model, [0, 1], [2, 0, EOS])
    loss = oracles.quadratic_loss(log_probs.exp(), phi, ref, alignment_coef, exact_diversity_coef)
    return mean, flat_gradient(loss, params)


@pytest.mark.parametrize("kind", CONFIGS_OF)
@pytest.mark.parametrize(("n", "coefs"), [(3, (1.0, 1.0)), (3, (0.7, 0.4)), (2, (1.0, 0.0))])
def test_mean_gradient_is_that_of_the_feature_matching_loss(kind, n, coefs):
    mean, exact = mean_and_exact_gradient(kind, n, *coefs, coefs[1], "leave_one_out")
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("kind", CONFIGS_OF)
@pytest.mark.parametrize("n", [2, 3])
def test_mean_gradient_of_the_trainers_own_baseline(kind, n):
    """Diversity shrinks by (n - 2) / (n - 1), to nothing for n = 2; with GRPO's baseline, all of it by (n - 1) / n."""
    mean, shrunk = mean_and_exact_gradient(kind, n, 1.0, 1.0, (n - 2) / (n - 1), "trainer")
    scale = 1 if kind == "rloo" else (n - 1) / n
    torch.testing.assert_close(mean, scale * shrunk, rtol=0, atol=1e-6 * shrunk.abs().max().item())


# What cannot be used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"reference_column": "completion"}, r"rename_column\('completion', 'reference'\)"),
        ({}, {"baseline": "rloo"}, "baseline='rloo' is unknown: use one of leave_one_out, trainer"),
        ({}, {"pooling": "concat"}, "pooling='concat' cannot be used here: use one of last_token, mean_pooling"),
        ({}, {"feature_norm": "l1"}, "feature_norm='l1'"),
        ({}, {"feature_reduction": "sum"}, "feature_reduction='sum'"),
        ({}, {"whitening": "zca"}, "whitening='zca' is unknown"),
        ({}, {"alignment": "dot", "whitening": "paper"}, "alignment='dot' with whitening='paper'"),
        ({}, {"feature_layers": (9,)}, "9 is out of range"),
        (
            {},
            {"feature_model": "/no/such/model"},
            "feature_model='/no/such/model' is neither a local model folder nor",
        ),
        (
            {},
            {"feature_model": tiny_model(vocab_size=5)},
            r"another vocabulary \(5 tokens\) than processing_class \(8\)",
        ),
        ({}, {"feature_model": lora_model()}, "feature_model has adapters"),
        ({}, {"feature_model": BertLMHeadModel(BERT)}, "'bert' is not supported: it is an encoder"),
        ({}, {"processing_class": "words"}, "processing_class=str: pass the policy's tokenizer"),
        ({"num_generations": 2}, {}, "num_generations=2 with diversity_coef=1.0: both completions have the same"),
        ({"normalize_advantages": True}, {}, "normalize_advantages=True makes other advantages"),
        ({"reward_clip_range": (-1.0, 1.0)}, {}, "set reward_clip_range=None, or baseline='trainer'"),
        ({"num_generations_eval": 6}, {}, "num_generations_eval=6 beside num_generations=3"),
    ],
)
def test_settings_that_cannot_be_used(settings, options, message):
    with pytest.raises(ValueError, match=message):
        word_reward(rloo_config(**settings), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rewards": "group"}, "set scale_rewards='none', or baseline='trainer'"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' makes other advantages"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "set multi_objective_aggregation='sum_then_normalize'",
        ),
        ({"num_generations": 2}, "set num_generations to 3 or more, diversity_coef=0, or baseline='trainer'"),
    ],
)
def test_settings_of_grpo_that_make_other_advantages(settings, message):
    with pytest.raises(ValueError, match=message):
        word_reward(grpo_config(**settings))
    assert word_reward(grpo_config(**settings), baseline="trainer").num_generations == settings.get(
        "num_generations", 3
    )


def test_other_configs_are_refused():
    with pytest.raises(ValueError, match="args=SFTConfig: pass the GRPOConfig or RLOOConfig"):
        word_reward(SFTConfig(output_dir="unused", use_cpu=True, bf16=False))


def test_one_completion_per_prompt_is_refused_by_trl():
    with pytest.raises(ValueError, match="at least 2 generations per prompt"):
        rloo_config(num_generations=1)


def test_two_completions_per_prompt_without_diversity():
    reward = word_reward(rloo_config(num_generations=2), diversity_coef=0.0)
    ids = [[0, EOS], [1, 1]]
    found = reward(["a b"] * 2, [""] * 2, ids, reference=["c"] * 2)
    ref = slow_features(word_model(seed=1), [0, 1], [2, EOS])
    expected = [2 * float(slow_features(word_model(seed=1), [0, 1], row) @ ref) for row in ids]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("field", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_batches_that_would_split_groups(field):
    """As they may be with several processes, where TRL asks for whole groups of all processes together alone."""
    args = rloo_config(per_device_eval_batch_size=6)
    args.eval_strategy = "steps"
    word_reward(args)
    setattr(args, field, 4)
    with pytest.raises(ValueError, match=f"{field}.* is 4, no multiple of num_generations=3"):
        word_reward(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": COMPLETION_IDS[:4], "prompts": PROMPTS[:4]}, "num_generations=3, but a process got 4"),
        ({"prompts": PROMPTS[1:] + PROMPTS[:1]}, "completions 0 and 2 have different prompts or references"),
        ({"reference": ["c", "c", "d", "c", "c", "c"]}, "completions 0 and 2 have different prompts or references"),
        ({"reference": [3] * 6}, "completion 0: reference is 3: give text, messages behind a prompt of messages"),
        ({"reference": [[{"role": "assistant", "content": "a"}]] * 6}, "completion 0: reference is .*give text"),
        ({"prompts": ["a " * 300] * 6}, "has 304 tokens and the feature network 256 positions"),
    ],
)
def test_calls_that_cannot_be_answered(changes, message):
    call = CALL | {"reference": ["c"] * 6} | changes
    with pytest.raises(ValueError, match=message):
        word_reward()(**call)


def test_missing_column_is_named():
    with pytest.raises(ValueError, match=r"reference_column='answer': the dataset's columns .*\['reference'\]"):
        word_reward(reference_column="answer")(**CALL, reference=REFERENCES)


def test_features_that_are_not_finite():
    model = word_model(seed=1)
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="features of a completion are not finite"):
        word_reward(feature_model=model)(**CALL, reference=REFERENCES)


def test_importing_the_package_imports_no_torch():
    code = "import sys, ebft.integrations; sys.exit(any(name in sys.modules for name in ('torch', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
