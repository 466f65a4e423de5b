"""Corners of a run: precision, odd models, the weights of drawn blocks, datasets at call time, what resume refuses."""

import shutil
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from torch import nn
from transformers import TrainingArguments

import interrupted
from ebft import EBFTConfig, EBFTTrainer
from ebft.artifacts import RunFolder
from ebft.layouts import batch_layout
from ebft.logprobs import document_and_block_log_probs
from ebft.objective import Objective, StepTotals, block_weights
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model
from training import config, documents, files, read_metrics, small_model, train, trainer

ROWS = documents([23, 17, 5, 30, 6, 12])


def float32_model(**options):
    return small_model(dtype=torch.float32, scale=8.0, **options)


# --- precision ---


@pytest.mark.parametrize("reuse", [True, False])
def test_bf16_reaches_the_inner_layers(tmp_path, reuse):
    """Autocast is around our forward, in sampling and in the update; a run in float32 may follow in the process."""
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        model, seen = float32_model(), set()
        for layer in [m for m in model.model.modules() if isinstance(m, nn.Linear)]:

            def hook(module, args, output, layer=layer, seen=seen):
                if module is layer:  # a copy keeps the hook
                    seen.add((torch.is_grad_enabled(), output.dtype))

            layer.register_forward_hook(hook)
        run = train(model, ROWS, tmp_path / str(bf16), settings=dict(bf16=bf16, reuse_sampling_forward=reuse))
        assert seen == ({(True, expected)} if reuse else {(False, expected), (True, expected)})
        assert all(value.dtype == torch.float32 for value in run.weights[-1].values())


@pytest.mark.parametrize("reuse", [False, True])
def test_rollouts_are_judged_without_autocast(tmp_path, reuse):
    """The feature network has a dtype of its own: the policy's autocast must not reach it."""

    class Recording(EBFTTrainer):
        seen = ()

        def compute_rewards(self, inputs, rollouts):
            self.seen = (*self.seen, torch.is_autocast_enabled("cpu"))
            return super().compute_rewards(inputs, rollouts)

    settings = dict(bf16=True, reuse_sampling_forward=reuse)
    run = train(float32_model(), ROWS, tmp_path, trainer_class=Recording, settings=settings)
    assert run.trainer.seen == (False,)


def test_without_cross_entropy_no_document_is_scored(tmp_path):
    """With ce_coef 0 the LM head runs over the rollouts alone."""
    rows = []
    for ce_coef in (0.3, 0.0):
        model, count = small_model(), [0]

        def hook(module, args, output, count=count):
            count[0] += args[0].shape[:-1].numel()

        model.lm_head.register_forward_hook(hook)
        train(model, ROWS, tmp_path / str(ce_coef), settings=dict(ce_coef=ce_coef, reuse_sampling_forward=True))
        rows.append(count[0])
    tokens = sum(len(row["input_ids"]) - 1 for row in ROWS)
    assert rows[1] <= rows[0] - tokens // 2


@pytest.mark.parametrize("bf16", [False, True])
def test_policy_has_no_divergence_from_itself(tmp_path, bf16):
    settings = dict(bf16=bf16, beta=0.1, kl_estimator="k3")
    metrics = train(float32_model(), ROWS, tmp_path, settings=settings).metrics[0]
    assert metrics["kl_loss"] == pytest.approx(0, abs=1e-9)
    # The rollouts' own log-probs are those of cached decoding, which rounds elsewhere.
    assert metrics["kl"] == pytest.approx(0, abs=1e-3 if bf16 else 1e-6)


def test_precision_of_the_launcher_must_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    try:
        with pytest.raises(ValueError, match="bf16=False but accelerate .* mixed_precision='bf16'"):
            trainer(float32_model(), ROWS, tmp_path)
    finally:
        AcceleratorState._reset_state()


# --- models ---


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    added, frozen = float32_model(), float32_model().requires_grad_(False)
    added.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter from add_adapter: wrap it with peft.get_peft_model"):
        trainer(added, ROWS, tmp_path)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        trainer(frozen, ROWS, tmp_path)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig: prompt learning adds tokens"):
        trainer(float32_model(), ROWS, tmp_path, peft_config=prompts)


def test_feature_model_with_fewer_embeddings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="50 token embeddings and the policy .* the policy can sample ids"):
        trainer(float32_model(), ROWS, tmp_path, feature_model=tiny_model(vocab_size=50))


def test_a_bf16_model_with_a_frozen_layer_trains_in_float32(tmp_path):
    model = small_model(dtype=torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    before, after = train(model, ROWS, tmp_path).weights
    assert all(value.dtype == torch.float32 for value in after.values())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(".layers.0." in name for name in moved)


def test_a_config_serves_several_trainers(tmp_path):
    args, rates = config(tmp_path, learning_rate=None), []
    for peft_config in (LoraConfig(r=2, target_modules=["q_proj"]), None):
        model, rows = float32_model(), Dataset.from_list(ROWS)
        tokenizer = trainer(float32_model(), ROWS, tmp_path / "other").processing_class
        ours = EBFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
        rates.append(ours.args.learning_rate)
    assert rates == [1e-5, 1e-6] and args.learning_rate is None


def test_arguments_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args=TrainingArguments: pass an EBFTConfig"):
        EBFTTrainer(float32_model(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=ROWS)


def test_changed_parts_of_a_step_are_honoured(tmp_path):
    """A sampler or a policy loss of one's own takes the place of the forward that does all at once."""

    class Sampler(EBFTTrainer):
        def sample(self, inputs, **keywords):
            drawn = super().sample(inputs, **keywords)
            return drawn._replace(tokens=torch.full_like(drawn.tokens, 7))

    class Loss(EBFTTrainer):
        def compute_policy_loss(self, log_probs, advantages, layout, totals):
            loss, metrics = super().compute_policy_loss(log_probs, advantages, layout, totals)
            # Not linear: its slope is that of the log-probs as they are.
            return loss + log_probs.square().sum(), metrics

    class Mine(Sampler, Loss):
        pass

    forwards = []
    for kind in (EBFTTrainer, Sampler, Loss, Mine):
        model = float32_model()

        def hook(module, args, output, layer=model.model.layers[0].mlp):
            if module is layer:  # a copy keeps the hook
                forwards.append(torch.is_grad_enabled())

        model.model.layers[0].mlp.register_forward_hook(hook)
        ours = trainer(model, ROWS, tmp_path / kind.__name__, trainer_class=kind, settings=dict(learning_rate=1e-4))
        forwards.clear()
        ours.train()
        assert (False in forwards) == (kind is not EBFTTrainer), "only then is there a forward for sampling alone"
    batch = ours.data_collator(list(ours.train_dataset))
    batch["layout"] = batch_layout(batch, ours.args, ours.anchors, 0)
    totals = StepTotals(float((batch["labels"][:, 1:] != -100).sum()), float(batch["layout"].valid.sum()))
    ours.compute_loss(ours.model, batch, num_items_in_batch=totals).backward()
    mine = [p.grad.clone() for p in ours.model.parameters()]
    ours.model.zero_grad()
    objective = Objective(ours.args, batch, totals, ours.coefficients(), ours.compute_policy_loss)
    ours._judge(objective, ours.sample(batch))
    tokens = objective.experience.rollouts.tokens
    assert (tokens == 7).all()
    objective(
        document_and_block_log_probs(ours.model, batch["input_ids"], tokens, batch["layout"], **ours.args.sampling)
    )[0].backward()
    for found, p in zip(mine, ours.model.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6)


def test_reused_forward_and_checkpointing_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="reuse_sampling_forward=True.*gradient_checkpointing"):
        config(tmp_path, reuse_sampling_forward=True, gradient_checkpointing=True)


# --- blocks ---


def test_drawn_blocks_stand_for_all(tmp_path):
    """Each document's weights sum to its blocks, at every step; over steps every block has weight 1."""
    ours = trainer(float32_model(), ROWS, tmp_path / "token", settings=dict(max_blocks=2))
    per_document = trainer(
        float32_model(), ROWS, tmp_path / "document", settings=dict(max_blocks=2, loss_normalization="document")
    )
    batch = ours.data_collator(list(ours.train_dataset))
    whole = batch_layout(batch, ours.args, ours.anchors, step=None)
    counts = whole.valid.sum(-1)
    assert counts.max() > 2 and counts.min() == 0
    steps, total = 600, torch.zeros(*batch["input_ids"].shape, dtype=torch.float64)
    for step in range(steps):
        layout = batch_layout(batch, ours.args, ours.anchors, step)
        weights = block_weights(layout, ours.args).double()
        assert torch.allclose(weights.sum(-1), counts.double())
        total.scatter_add_(1, layout.anchors, weights * layout.valid)
        means = block_weights(layout, per_document.args).double().sum(-1)
        assert torch.allclose(means, (counts > 0).double())
    mean = (total / steps).gather(1, whole.anchors)[whole.valid]
    deviation = (counts.max() / 2 - 1).item() ** 0.5 / steps**0.5  # weight K/2 with probability 2/K
    assert (mean - 1).abs().max() < 5 * deviation


def test_packed_rows_without_document_masking_may_have_short_documents(tmp_path):
    """A block of 3 tokens behind 4 fits in no document of 5, but in a row of them."""
    rows = documents([5] * 8)
    run = train(float32_model(), rows, tmp_path, settings=dict(packing=True, document_masking=False))
    assert "reward" in run.metrics[0]
    with pytest.raises(ValueError, match="too short for a block"):
        trainer(float32_model(), rows, tmp_path / "masked", settings=dict(packing=True))


# --- evaluation by call ---


def test_evaluation_before_training_and_of_a_raw_dataset(tmp_path):
    held_out = Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog."}])
    ours = trainer(float32_model(), ROWS, tmp_path, eval_dataset=Dataset.from_list(documents([22, 9], seed=7)))
    before = ours.evaluate()
    ours.train()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["eval_loss"] == before["eval_loss"] and "loss" in lines[1]
    tokenizer = ours.processing_class
    ids = torch.tensor([tokenizer(held_out[0]["text"] + tokenizer.eos_token)["input_ids"]])
    with torch.no_grad():
        expected = float(ours.model.eval()(ids, labels=ids).loss)
    raw, several = ours.evaluate(held_out), ours.evaluate({"x": held_out})
    assert raw["eval_ce_loss"] == several["eval_x_ce_loss"] == pytest.approx(expected, rel=1e-5)
    assert "eval_feature_matching_loss" in raw


# --- resume ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return interrupted.run("full", tmp_path_factory.mktemp("whole"), eval_on_start=True)


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    return shutil.copytree(whole.folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(feature_layers=[0.5]), "'layers': '1,2,3'.*'layers': '2'"),
        (dict(pooling="mean_pooling"), "'pooling': 'last_token'.*'pooling': 'mean_pooling'"),
    ],
)
def test_other_features_are_refused(copy_of_whole, settings, message):
    with pytest.raises(ValueError, match=message):
        interrupted.run("full", copy_of_whole, resume=True, max_steps=8, **settings)


def test_anothers_checkpoint_is_refused(copy_of_whole, whole, tmp_path):
    with pytest.raises(ValueError, match="output_dir=.* holds another run"):
        interrupted.run("full", copy_of_whole, resume=str(whole.folder / "checkpoint-2"))
    assert files(copy_of_whole, "metrics.jsonl") == files(whole.folder, "metrics.jsonl")


def test_a_spoilt_line_of_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"st')  # cut off by a kill
    RunFolder(tmp_path).start({}, 2)
    assert path.read_text() == "".join(lines[:2])
    path.write_text(lines[0] + "\0\0\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: no record of a step .*: remove that line"):
        RunFolder(tmp_path).start({}, 2)


def test_auto_does_not_replace_a_finished_model(tmp_path):
    run = train(small_model(), documents([30] * 4), tmp_path)
    run.trainer.save_model()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds a model \(model\.safetensors\) and no checkpoint"):
        train(small_model(), documents([30] * 4), tmp_path, "auto")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resume_from_an_earlier_checkpoint_is_the_unbroken_run(copy_of_whole, whole):
    """The first evaluation is not repeated, and the later checkpoints of the old branch are set aside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resuming with other settings")
        interrupted.run("full", copy_of_whole, resume=str(copy_of_whole / "checkpoint-2"), eval_on_start=True)
    assert files(copy_of_whole, "metrics.jsonl") == files(whole.folder, "metrics.jsonl")
    aside = sorted(path.name.split("-", 2)[2] for path in copy_of_whole.glob("_superseded-*"))
    assert aside == ["checkpoint-4", "checkpoint-6"]


def test_changed_settings_are_refused(copy_of_whole):
    with pytest.raises(ValueError, match=r"was written with other settings \(ce_coef 0.3 -> 0.2\)"):
        interrupted.run("full", copy_of_whole, resume=True, max_steps=7, eval_on_start=True, ce_coef=0.2)


def test_evaluation_alone_may_use_workers(tmp_path):
    """Without a training set nothing is streamed, so there is nothing to refuse."""
    args = EBFTConfig(str(tmp_path), use_cpu=True, max_length=128, report_to="none", dataloader_num_workers=2)
    documents = Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 2)
    EBFTTrainer(small_model(), args, eval_dataset=documents, processing_class=byte_bpe_tokenizer())
