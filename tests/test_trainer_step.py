"""One step of EBFTTrainer against the oracle's: parameters and metrics, however the documents are batched."""

import copy
from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import step_oracle
from ebft import EBFTTrainer
from tiny import byte_bpe_tokenizer
from training import SETTINGS, config, documents, read_rollouts, relative_error, small_model, train

LENGTHS = [23, 5, 17, 30, 6, 12, 3, 26]  # of 5 (bounds: 4 + 3), 6 and 3 tokens: too short for a block
PROMPTS = [9, 2, 3, 11, 5, 4, 1, 25]
ROWS = documents(LENGTHS)
PROMPTED = documents(LENGTHS, prompts=PROMPTS)
BATCHES = {
    "padded": {},
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "one_by_one": dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),  # some without any block
    "packed": dict(packing=True),
    "packed_accumulated": dict(packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=4),
}
ANSWERS = dict(rows=PROMPTED, completion_only_loss=True)


# B is not zero at the start: the adapter matters, the policy is not its own base, and every adapter weight moves.
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)


def make_model(adapted=False, family="qwen2", dtype=torch.float64):
    model = small_model(family, dtype=dtype, scale=8.0)
    torch.manual_seed(5)
    return get_peft_model(model, LORA) if adapted else model


def oracle_documents(rows, completion_only_loss=False):
    """Documents of tokenised rows: what is an answer and what is trained on."""
    out = []
    for row in rows:
        answer = row.get("completion_mask", [1] * len(row["input_ids"]))
        out.append(
            row | {"completion_mask": answer, "loss_mask": answer if completion_only_loss else [1] * len(answer)}
        )
    return out


def check_step(run, plain, rows, step=1, tolerance=1e-5, new_adapter=False, base=None, metric_tolerance=1e-5):
    """The run's weights after `step`, and its metrics, are the oracle's; tolerance in norms of the update."""
    args = run.trainer.args
    policy, initial = (copy.deepcopy(plain) for _ in range(2))
    policy.load_state_dict(run.weights[step - 1])
    base = copy.deepcopy(plain) if base is None else base
    if hasattr(base, "peft_config"):
        base = base.unload()
        initial = base if new_adapter else initial
    kernel = step_oracle.kernel_of(run.trainer.kernel_record)
    expected = step_oracle.step_loss(policy, initial, base, rows, read_rollouts(run.folder, step), args, kernel)
    after = step_oracle.sgd_step(policy, expected["loss"], args.learning_rate, args.max_grad_norm)
    assert relative_error(run.weights[step - 1], run.weights[step], after) < tolerance
    metrics = next(m for m in run.metrics if m["step"] == step)
    for name, value in expected.items():
        if name in metrics or (value and not (name == "ce_loss" and args.ce_coef == 0)):
            assert metrics[name] == pytest.approx(float(value.detach()), rel=metric_tolerance, abs=1e-6), name


def run_case(folder, rows=ROWS, adapted=False, new_adapter=False, family="qwen2", **settings):
    model = make_model(adapted, family)
    plain = copy.deepcopy(model)
    keywords = {"peft_config": LORA} if new_adapter else {}
    return train(model, rows, folder, settings=settings, **keywords), plain


# --- every way to cut the same documents up gives the same step, and it is the oracle's ---

OBJECTIVES = {
    "all_tokens": {},
    "answers": ANSWERS,
    "lora": dict(adapted=True),
    "per_document": dict(loss_normalization="document", **ANSWERS),
    "random_blocks": dict(max_blocks=2, random_anchor_offset=True),
}


@pytest.fixture(scope="module")
def padded_runs(tmp_path_factory):
    return cache(lambda name: run_case(tmp_path_factory.mktemp(name), **OBJECTIVES[name]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step_is_the_oracles(padded_runs, objective):
    run, plain = padded_runs(objective)
    rows = OBJECTIVES[objective].get("rows", ROWS)
    check_step(run, plain, oracle_documents(rows, completion_only_loss=rows is PROMPTED))
    assert run.metrics[0]["documents_without_block"] >= 3
    assert run.metrics[0]["num_tokens"] == sum(LENGTHS)


@pytest.mark.parametrize("batches", [name for name in BATCHES if name != "padded"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step_does_not_depend_on_batches(padded_runs, tmp_path, objective, batches):
    padded, _ = padded_runs(objective)
    run, _ = run_case(tmp_path, **(OBJECTIVES[objective] | BATCHES[batches]))
    ours, theirs = read_rollouts(run.folder), read_rollouts(padded.folder)
    assert {k: [r["token_ids"] for r in rows] for k, rows in ours.items()} == {
        k: [r["token_ids"] for r in rows] for k, rows in theirs.items()
    }
    assert relative_error(run.weights[0], run.weights[1], padded.weights[1]) < 1e-5
    for name, value in padded.metrics[0].items():
        assert run.metrics[0][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_blocks_are_those_of_the_documents(padded_runs):
    args = config("unused")
    for objective, rows, in_completion in (("all_tokens", ROWS, False), ("answers", PROMPTED, True)):
        run, _ = padded_runs(objective)
        expected = {(i, a) for i, d in enumerate(rows) for a in step_oracle.anchors(d, args, in_completion)}
        assert set(read_rollouts(run.folder)) == expected
    run, _ = padded_runs("random_blocks")
    chosen = set(read_rollouts(run.folder))
    offsets = set()
    for index, document in enumerate(ROWS):
        mine = {a for i, a in chosen if i == index}
        possible = [set(step_oracle.anchors(document, args, False, offset)) for offset in range(args.stride)]
        fitting = [o for o, anchors in enumerate(possible) if mine <= anchors and len(mine) == min(2, len(anchors))]
        assert fitting, (index, mine)
        offsets |= set(fitting) if len(document["input_ids"]) > 20 else set()
    assert len(offsets) > 1


# --- one thing at a time ---

CASES = {
    "untied": dict(family="llama"),
    "per_token": dict(pooling="token"),
    "per_token_packed": dict(pooling="token", packing=True, **ANSWERS),
    "mean_pooling": dict(pooling="mean_pooling"),
    "released": dict(whitening="released"),
    "no_whitening": dict(whitening="none", diversity_coef=0.5),
    "cosine": dict(whitening="none", alignment="cosine", alignment_coef=0.5),
    "pairs": dict(num_generations=2),
    "clipped": dict(
        max_grad_norm=0.01, learning_rate=10.0, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ),
    "checkpointing": dict(gradient_checkpointing=True, per_device_train_batch_size=3, gradient_accumulation_steps=3),
    "two_forwards": dict(reuse_sampling_forward=False, per_device_train_batch_size=3, gradient_accumulation_steps=3),
    "two_forwards_lora": dict(reuse_sampling_forward=False, adapted=True),
    "checkpointing_lora": dict(gradient_checkpointing=True, adapted=True, packing=True),
    "no_cross_entropy": dict(ce_coef=0.0),
    "rbf": dict(kernel="rbf", kernel_scales=[0.5, 2.0], diversity_coef=0.5),
    "rbf_per_token_packed": dict(kernel="rbf", pooling="token", packing=True, **ANSWERS),
    "rbf_concat_two_forwards": dict(
        kernel="rbf", kernel_bandwidth=0.7, pooling="concat", reuse_sampling_forward=False
    ),
    "energy": dict(kernel="energy", pooling="mean_pooling", num_generations=2),
    "energy_lora": dict(kernel="energy", adapted=True),
    "characteristic": dict(kernel="characteristic", kernel_frequencies=5, kernel_scales=[1.0, 3.0]),
    "characteristic_lora": dict(kernel="characteristic", kernel_frequencies=5, adapted=True, packing=True),
    "ngram": dict(kernel="ngram", ngram_sizes=[1, 3], per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "ngram_lora_packed": dict(kernel="ngram", ngram_sizes=[1, 2], adapted=True, packing=True, **ANSWERS),
}


@pytest.mark.parametrize("case", CASES)
def test_step_with(tmp_path, case):
    settings = CASES[case]
    run, plain = run_case(tmp_path, **settings)
    rows = settings.get("rows", ROWS)
    check_step(run, plain, oracle_documents(rows, completion_only_loss=rows is PROMPTED))
    if case == "clipped":
        assert run.metrics[0]["grad_norm"] > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_kl_to_the_initial_policy(tmp_path, estimator, adapted):
    """Also where that already has an adapter. The first step leads away from it, the second feels it."""
    rows, settings = documents([23, 17, 6]), dict(beta=0.7, kl_estimator=estimator, max_steps=2, learning_rate=1.0)
    run, plain = run_case(tmp_path, rows, adapted, loss_normalization="document", **settings)
    check_step(run, plain, oracle_documents(rows), step=2)
    assert run.metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert abs(run.metrics[1]["kl"]) > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_to_the_base_of_a_new_adapter(tmp_path, estimator):
    run, _ = run_case(tmp_path, new_adapter=True, beta=0.5, kl_estimator=estimator, packing=True)
    check_step(run, make_model(adapted=True), oracle_documents(ROWS), new_adapter=True)


def test_step_without_any_block(tmp_path):
    rows = documents([5, 6, 23])
    run, plain = run_case(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    check_step(run, plain, oracle_documents(rows[:2]))
    assert "reward" not in run.metrics[0] and run.metrics[0]["documents_without_block"] == 2
    run, plain = run_case(tmp_path / "no_ce", rows, per_device_train_batch_size=1, ce_coef=0.0)
    for name, value in run.weights[0].items():
        assert torch.equal(run.weights[1][name], value)


def test_packed_without_document_masking(tmp_path):
    """A row is then one document, whose borders are only not trained on."""
    rows = documents([17, 5, 12])
    run, plain = run_case(tmp_path, rows, packing=True, document_masking=False)
    joined = [rows[0], rows[2], rows[1]]  # the longest first
    loss_mask = [int(p > 0) for row in joined for p in range(len(row["input_ids"]))]
    check_step(run, plain, [{"input_ids": [t for row in joined for t in row["input_ids"]], "loss_mask": loss_mask}])
    assert set(read_rollouts(tmp_path)) == {(0, anchor) for anchor in range(4, 34 - 3 + 1, 5)}


def test_prompt_and_completion(tmp_path):
    """From strings: the completion with its EOS is trained on and sampled, the prompt is prefix only."""
    tokenizer = byte_bpe_tokenizer()
    texts = [
        ("def add(a, b):", "\n    return a + b\n"),
        ("2 + 2 =", " 4"),
        ("the quick", " brown fox jumps over the dog."),
    ]
    rows = []
    for prompt, completion in texts:
        ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        assert ids[:start] == tokenizer(prompt)["input_ids"]
        mask = [int(p >= start) for p in range(len(ids))]
        rows.append({"input_ids": ids, "completion_mask": mask, "loss_mask": mask})
    model = small_model("llama", scale=8.0)
    plain = copy.deepcopy(model)
    dataset = Dataset.from_list([{"prompt": p, "completion": c} for p, c in texts])
    run = train(model, dataset, tmp_path, settings=dict(packing=True, max_length=64))
    check_step(run, plain, rows)
    args = run.trainer.args
    assert set(read_rollouts(tmp_path)) == {
        (i, a) for i, d in enumerate(rows) for a in step_oracle.anchors(d, args, True)
    }
    assert run.trainer.anchors == "completion"


def test_bf16_autocast(tmp_path):
    """Forwards in bfloat16 over float32 weights; both round, in other places: 10 % of the update's norm."""
    model = make_model(dtype=torch.float32, family="llama")
    plain = copy.deepcopy(model)
    run = train(model, ROWS, tmp_path, settings=dict(bf16=True) | BATCHES["accumulated"])
    policy, phi = copy.deepcopy(plain), copy.deepcopy(plain).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        groups = read_rollouts(tmp_path)
        expected = step_oracle.step_loss(policy, plain, phi, oracle_documents(ROWS), groups, run.trainer.args)
    after = step_oracle.sgd_step(policy, expected["loss"], run.trainer.args.learning_rate)
    assert relative_error(run.weights[0], run.weights[1], after) < 0.1
    assert all(value.dtype == torch.float32 for value in run.weights[1].values())


# --- without rollouts: TRL's SFTTrainer ---

TEXTS = [
    "the quick brown fox jumps over the lazy dog.",
    "def main():\n    print(add(1, 2))\n",
    "the dog",
    "2 + 2 = 4; the fox",
]
PAIRS = [{"prompt": t[:9], "completion": t[9:]} for t in TEXTS if len(t) > 12]
SFT_CASES = {
    "padded": (dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), [{"text": t} for t in TEXTS]),
    "completion_only": (dict(per_device_train_batch_size=1, gradient_accumulation_steps=3), PAIRS),
    "prompt_too": (dict(completion_only_loss=False), PAIRS),
    "packed": (dict(packing=True), [{"text": t} for t in TEXTS]),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_without_rollouts_it_is_the_step_of_trl(tmp_path, case):
    settings, rows = SFT_CASES[case]
    tokenizer = byte_bpe_tokenizer()
    model = small_model("llama", dtype=torch.float32)
    theirs = copy.deepcopy(model)
    run = train(model, rows, tmp_path / "ours", settings=settings | dict(rl_coef=0.0, ce_coef=1.0, max_length=64))
    assert run.trainer.feature_network is None
    assert not (tmp_path / "ours" / "rollouts").exists()

    names = (
        "max_steps",
        "per_device_train_batch_size",
        "train_sampling_strategy",
        "optim",
        "learning_rate",
        "use_cpu",
    )
    names += ("lr_scheduler_type", "warmup_steps", "max_grad_norm", "gradient_accumulation_steps", "disable_tqdm")
    shared = {name: (SETTINGS | settings)[name] for name in names}
    sft = SFTConfig(
        str(tmp_path / "theirs"),
        max_length=64,
        packing=settings.get("packing", False),
        completion_only_loss=settings.get("completion_only_loss"),
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        **shared,
    )
    SFTTrainer(theirs, sft, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    assert relative_error(run.weights[0], run.weights[1], theirs.state_dict()) < 1e-5


class Sampled(AssertionError):
    """Raised where nothing may be sampled."""


def test_without_rollouts_nothing_is_sampled(tmp_path):
    class NoSampling(EBFTTrainer):
        def sample(self, *args, **kwargs):
            raise Sampled

    settings = dict(rl_coef=0.0, ce_coef=1.0)
    train(make_model(), ROWS, tmp_path / "sft", settings=settings, trainer_class=NoSampling)
    with pytest.raises(Sampled):
        train(make_model(), ROWS, tmp_path / "ebft", trainer_class=NoSampling)


# --- from a half-precision checkpoint ---


def test_adamw_step_from_a_bf16_checkpoint_moves_the_weights(tmp_path):
    small_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    settings = dict(learning_rate=1e-6, optim="adamw_torch", max_grad_norm=1.0)
    run = train(str(tmp_path / "checkpoint"), ROWS, tmp_path / "run", settings=settings)
    before, after = run.weights
    assert all(value.dtype == torch.float32 for value in after.values())
    changed = sum(int((before[k] != after[k]).sum()) for k in before)
    assert changed > 0.99 * sum(value.numel() for value in before.values())
    assert all(torch.equal(v, v.bfloat16().float()) for v in before.values())


@pytest.mark.parametrize("given", ["path", "bf16 model", "lora"])
def test_saved_model_loads_in_plain_transformers(tmp_path, given):
    checkpoint = str(tmp_path / "checkpoint")
    small_model("llama", dtype=torch.bfloat16).save_pretrained(checkpoint)
    model = checkpoint if given == "path" else AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    keywords = dict(peft_config=LoraConfig(r=2, init_lora_weights=False)) if given == "lora" else {}
    run = train(model, ROWS, tmp_path / "run", settings=dict(learning_rate=0.01), **keywords)
    run.trainer.save_model(str(tmp_path / "saved"))
    ids = torch.tensor([ROWS[0]["input_ids"]])
    if given == "lora":
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert loaded.dtype == torch.float32
        assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = run.trainer.model.eval()(ids).logits
        assert torch.equal(loaded.eval()(ids).logits, expected)
