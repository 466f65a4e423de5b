"""Measures of documents against plain forwards and small cases; shared prompts; records of an interrupted call."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
from datasets import Dataset
from rich.console import Console

import held_out
from ebft import FeatureNetwork
from ebft.data import tokenize_documents
from ebft.evaluation import (
    DocumentMean,
    DocumentSettings,
    EvaluationConfig,
    document_means,
    document_measures,
    evaluate,
)
from ebft.evaluation.batches import batches_of
from ebft.evaluation.contexts import all_contexts, contexts_of
from ebft.evaluation.diversity import distinct, duplicate_rate, self_bleu, until_end
from ebft.evaluation.document_measures import prompt_groups
from ebft.evaluation.feature_matching import reference_variance
from ebft.evaluation.records import RecordFile
from ebft.evaluation.summary import summarise
from ebft.evaluation.token_statistics import token_statistics
from ebft.noise import EVALUATION, sampling_uniforms
from ebft.rollout import sample_rollouts
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

SETTINGS = DocumentSettings(
    lengths=(1, 2, 4), num_generations=3, contexts_per_document=2, context_length=3, batch_size=2
)


@pytest.fixture(scope="module")
def models():
    return held_out.model_and_network()


@pytest.fixture(scope="module")
def documents():
    return held_out.raw_documents()


def measured(model, phi, documents, settings=SETTINGS, tokenizer=None):
    return document_means(model, FeatureNetwork(phi), documents, settings, tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_token_statistics_are_those_of_a_plain_forward(documents, family):
    model = tiny_model(family, scale=3.0)
    (batch,) = batches_of(documents, 8, "cpu")
    found = token_statistics(model, batch["input_ids"], batch["doc_ids"])
    for i, row in enumerate(documents):
        log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        n = len(log_probs)
        expected = log_probs.gather(-1, torch.tensor(row["input_ids"][1:])[:, None])[:, 0]
        torch.testing.assert_close(found.log_probs[i, :n], expected, rtol=0, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=log_probs).entropy()
        torch.testing.assert_close(found.entropy[i, :n], entropy, rtol=0, atol=1e-5)


def test_measures_in_one_pass_are_those_of_a_pass_each(models, documents):
    model, phi = models
    together = measured(model, phi, documents)
    apart = [measured(model, phi, documents, replace(SETTINGS, measures=(name,))) for name in SETTINGS.measures]
    assert set(together) == {name for found in apart for name in found}
    for name, value in ((name, value) for found in apart for name, value in found.items()):
        torch.testing.assert_close(together[name].sums, value.sums, rtol=0, atol=1e-6)
        assert torch.equal(together[name].counts, value.counts)
    assert "feature_matching_floor" not in together, "no two documents share a prompt"


@pytest.mark.parametrize(("temperature", "forwards"), [(1.0, 1), (0.6, 2)])
def test_text_is_read_once_per_temperature(models, documents, monkeypatch, temperature, forwards):
    read = []
    monkeypatch.setattr(
        document_measures, "token_statistics", lambda *args: read.append(args) or token_statistics(*args)
    )
    settings = replace(SETTINGS, measures=("cross_entropy", "calibration"), temperature=temperature, batch_size=8)
    measured(*models, documents, settings)
    assert len(read) == forwards


def test_measures_do_not_depend_on_batches(models, documents):
    model, phi = models
    one, other = (measured(model, phi, documents, replace(SETTINGS, batch_size=size)) for size in (1, 4))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].sums, other[name].sums, rtol=0, atol=1e-5)
        assert torch.equal(one[name].counts, other[name].counts)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_calibration_token_by_token(models, documents, temperature):
    """Entropies of a rollout's steps and of the text, from one plain forward per context and rollout."""
    model, phi = models
    found = measured(model, phi, documents, replace(SETTINGS, measures=("calibration",), temperature=temperature))
    assert set(found) == {"entropy/rollout", "entropy/reference", "cross_entropy/reference"}
    (batch,) = batches_of(documents, 8, "cpu")
    layout = contexts_of(batch, SETTINGS)
    noise = sampling_uniforms(layout, batch["document_ids"], 3, seed=0, purpose=EVALUATION, step=0)
    options = dict(uniforms=noise, temperature=temperature)
    tokens = sample_rollouts(model, batch["input_ids"], layout, 3, **options).tokens
    for i, row in enumerate(documents):
        sums = torch.zeros(3, 4, dtype=torch.float64)
        for k in layout.valid[i].nonzero().flatten().tolist():
            anchor, ids = int(layout.anchors[i, k]), torch.tensor(row["input_ids"])
            for rollout in tokens[i, k]:
                logits = model(torch.cat([ids[:anchor], rollout])[None]).logits[0, anchor - 1 : -1] / temperature
                sums[0] += torch.distributions.Categorical(logits=logits).entropy().double() / 3
            logits = model(ids[None, : anchor + 4]).logits[0, anchor - 1 : -1] / temperature
            sums[1] += torch.distributions.Categorical(logits=logits).entropy().double()
            sums[2] += torch.nn.functional.cross_entropy(logits, ids[anchor : anchor + 4], reduction="none").double()
        for value, name in zip(sums, ("entropy/rollout", "entropy/reference", "cross_entropy/reference"), strict=True):
            torch.testing.assert_close(found[name].sums[i], value, rtol=0, atol=2e-5)


def test_contexts_are_drawn_without_a_look_at_the_end(documents):
    """The first place, and random ones of which none has the document's last token in its reference."""
    (batch,) = batches_of(documents, 8, "cpu")
    drawn: list[list[int]] = [[] for _ in documents]
    for seed in range(250):
        layout = contexts_of(batch, replace(SETTINGS, seed=seed))
        for row, valid in enumerate(layout.valid):
            places = layout.anchors[row][valid].tolist()
            drawn[row] += places[1:]
            assert places[:1] == ([3] if len(documents[row]["input_ids"]) >= 7 else [])
    lengths = [len(row["input_ids"]) for row in documents]
    assert [sorted(set(places)) for places in drawn] == [[*range(4, n - 4)] if n > 8 else [] for n in lengths]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_model_is_calibrated_on_text_of_its_own(temperature):
    """At every place of a completion its cross-entropy on the text is the entropy of what it writes there.

    And both are of all places of a document alike, known from the text's own distribution: not of its first words,
    which say little here, nor of its last ones.
    """
    model, rows = held_out.own_text(temperature)
    settings = DocumentSettings(("calibration",), (1, 4), contexts_per_document=4, context_length=2, batch_size=64)
    found = measured(model, model, rows, replace(settings, temperature=temperature))
    differences = {"calibration": found["cross_entropy/reference"] - found["entropy/rollout"]}
    log_probs = (held_out.transitions() / temperature).log_softmax(-1)
    entropies = torch.distributions.Categorical(logits=log_probs).entropy()
    for measure in ("cross_entropy/reference", "entropy/reference"):
        expected = []
        for ids in (torch.tensor(row["input_ids"]) for row in rows):
            values = entropies[ids[:-1]] if measure == "entropy/reference" else -log_probs[ids[:-1], ids[1:]]
            first, *others, _ = values[1:].unfold(0, 4, 1)  # values[0] is of token 1, the first context before token 2
            expected.append(first + min(3, len(others)) * torch.stack(others).mean(0))
        differences[measure] = DocumentMean(found[measure].sums - torch.stack(expected), found[measure].counts)
    for name, difference in differences.items():
        mean, low, high = difference.estimate()
        standard_error = (high - low) / (2 * 1.96)
        assert (standard_error < 0.05).all(), f"{name}: the test could not see a difference"
        assert (mean.abs() < 4 * standard_error).all(), f"{name}: {mean}"


# --- several references of one prompt ---


def test_variance_of_references_is_unbiased():
    """Its mean over all draws of M features from four, enumerated, is the variance of the four."""
    points = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = points.square().sum(-1).mean() - points.mean(0).square().sum()
    for m in (2, 3):
        draws = torch.tensor(list(itertools.product(range(4), repeat=m)))
        values = points[draws] @ points[draws].mT
        assert reference_variance(values).mean().item() == pytest.approx(exact.item(), abs=1e-12)


def test_documents_of_one_prompt_are_one_group(documents):
    tokenizer = byte_bpe_tokenizer()
    rows = [{"prompt": p, "completion": c} for p, c in (("a fox", " runs"), ("a dog", " sits"), ("a fox", " sits"))]
    asked = list(tokenize_documents(Dataset.from_list(rows), tokenizer, max_length=64))
    assert [[row["document_id"] for row in group] for group in prompt_groups(asked)] == [[0, 2], [1]]
    assert [len(group) for group in prompt_groups([*documents, documents[0]])] == [2, 1, 1, 1]


@pytest.fixture(scope="module")
def own_rollouts():
    """A model and, as documents, eight of its own rollouts behind each of 60 prompts."""
    model, G, n = tiny_model(seed=2, scale=6.0), 4, 8
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, 61, (60, 5), generator=generator)
    (batch,) = batches_of(
        [
            {
                "input_ids": [*row, *[3] * G],
                "completion_mask": [0] * 5 + [1] * G,
                "loss_mask": [1] * 9,
                "document_id": i,
            }
            for i, row in enumerate(prompts.tolist())
        ],
        60,
        "cpu",
    )
    layout = all_contexts(batch, 3, G)
    tokens = sample_rollouts(model, batch["input_ids"], layout, n, generator=generator).tokens[:, 0]
    rows = [
        {"input_ids": [*prompt, *rollout], "completion_mask": [0] * 5 + [1] * G, "loss_mask": [1] * 9}
        for prompt, rollouts in zip(prompts.tolist(), tokens.tolist(), strict=True)
        for rollout in rollouts
    ]
    return model, [row | {"document_id": i} for i, row in enumerate(rows)]


def test_model_against_its_own_rollouts(own_rollouts):
    """L_CFM is then the variance of the references, not 0, and L_FM, what is above it, is 0 within its interval."""
    model, rows = own_rollouts
    options = dict(measures=("feature_matching",), contexts_per_document=1, batch_size=64, num_generations=4)
    settings = replace(SETTINGS, **options)
    found = measured(model, tiny_model(seed=5, scale=3.0), rows, settings)
    assert found["feature_matching_floor"].counts.tolist() == [1.0] * 60
    floor, loss, excess = (found[f"feature_matching_{name}"].estimate() for name in ("floor", "loss", "excess"))
    assert (floor.mean > 0.05).all()
    assert ((excess.low <= 0) & (excess.high >= 0)).all()
    assert ((loss.low <= floor.mean) & (floor.mean <= loss.high)).all()
    torch.testing.assert_close(loss.mean - floor.mean, excess.mean)
    another = measured(tiny_model(seed=8, scale=12.0), tiny_model(seed=5, scale=3.0), rows, settings)
    assert (another["feature_matching_excess"].estimate().low > 0)[-1], "another model is told apart"


def test_a_prompt_with_a_reference_too_short_has_no_floor(own_rollouts):
    """Its longer references alone are not what the model should match; its loss stays."""
    model, rows = own_rollouts
    columns = ("input_ids", "completion_mask", "loss_mask")
    shorter = [rows[0] | {name: rows[0][name][:-1] for name in columns}, *rows[1:24]]
    options = dict(measures=("feature_matching",), contexts_per_document=1, num_generations=2)
    found = measured(model, tiny_model(seed=5), shorter, replace(SETTINGS, **options))
    for name in ("floor", "shared", "excess"):
        assert found[f"feature_matching_{name}"].counts.tolist() == [0.0, 1.0, 1.0]
    assert found["feature_matching_loss"].counts.tolist() == [7.0, 8.0, 8.0]


# --- diversity ---


def test_diversity_of_small_cases():
    assert duplicate_rate([[1, 2], [1, 2], [1, 3], [1, 2]]) == pytest.approx(2 / 4)
    assert distinct([[1, 2, 1], [1, 2]], 1) == pytest.approx(2 / 5)
    assert distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[1], [2]], 2) is None
    assert until_end([5, 6, 0, 7, 3], [3, 0]) == [5, 6]
    assert until_end([5, 6], []) == [5, 6]


def test_self_bleu():
    pytest.importorskip("sacrebleu")
    same = "the quick brown fox jumps over the lazy dog"
    assert self_bleu([same, same, same]) == pytest.approx(100)
    other = "completely different words stand here in this line"
    assert 0 <= self_bleu([same, other]) < 10
    assert self_bleu([same, "", " "]) is None


def test_diversity_of_documents(models, documents):
    """Equal rollouts at a temperature near 0; the texts' self-BLEU needs a tokenizer."""
    model, phi = models
    options = dict(measures=("diversity",), temperature=1e-4)
    found = measured(model, phi, documents, replace(SETTINGS, **options))
    assert found["duplicate_rate"].estimate().mean.item() == pytest.approx(2 / 3)
    assert found["duplicate_rate"].counts.tolist() == [2, 2, 2, 0]
    assert found["distinct_1"].estimate().mean.item() <= 1 / 3 + 1e-9
    assert "self_bleu" not in found


def test_diversity_ends_at_all_of_a_models_ends(documents):
    """Those of its generation config, though no tokenizer calls them special, and its tokenizer's."""
    model, tokenizer = tiny_model(seed=0, scale=3.0), byte_bpe_tokenizer()
    model.generation_config.eos_token_id = [*range(20, 30)]
    settings = replace(SETTINGS, measures=("diversity",), num_generations=16)
    (batch,) = batches_of(documents, 8, "cpu")
    layout = contexts_of(batch, settings)
    noise = sampling_uniforms(layout, batch["document_ids"], 16, seed=0, purpose=EVALUATION, step=0)
    tokens = sample_rollouts(model, batch["input_ids"], layout, 16, uniforms=noise).tokens
    kept = []
    for rollout in tokens[layout.valid].flatten(0, 1).tolist():
        ends = [place for place, token in enumerate(rollout) if token in (tokenizer.eos_token_id, *range(20, 30))]
        kept.append(tuple(rollout[: min(ends, default=4)]))
    assert tokenizer.eos_token_id in tokens[layout.valid], "the test could not see it"
    contexts = [kept[i : i + 16] for i in range(0, len(kept), 16)]
    found = document_means(model, None, documents, settings, tokenizer)
    expected = sum(1 - len(set(rollouts)) / 16 for rollouts in contexts)
    assert found["duplicate_rate"].sums.sum().item() == pytest.approx(expected)
    shares = [[token for rollout in rollouts for token in rollout] for rollouts in contexts]
    expected = sum(len(set(share)) / len(share) for share in shares)
    assert found["distinct_1"].sums.sum().item() == pytest.approx(expected)


def test_each_models_texts_end_where_its_own_tokenizer_says(tmp_path, documents):
    """Of models with one vocabulary and different ends: the documents are the first one's, the ends are not."""
    tokenizer = byte_bpe_tokenizer()
    model = tiny_model(seed=0, scale=3.0, vocab_size=len(tokenizer), dtype=torch.float32)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        likely = int(model(torch.tensor([documents[1]["input_ids"]])).logits.mean((0, 1)).argmax())
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(likely)
    rows = [{"input_ids": row["input_ids"]} for row in documents]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = replace(SETTINGS, measures=("diversity",), num_generations=32)
    options = {name: value for name, value in asdict(settings).items() if name != "measures"}
    config = EvaluationConfig(
        [str(tmp_path / "first"), str(tmp_path / "second")],
        str(tmp_path / "out"),
        str(tmp_path / "text.jsonl"),
        metrics=["diversity"],
        device="cpu",
        plots=False,
        **options,
    )
    found = {r["model"]: r["mean"] for r in evaluate(config, Console(quiet=True)) if r["measure"] == "distinct_1"}
    texts = list(tokenize_documents(Dataset.from_list(rows), byte_bpe_tokenizer(), max_length=64))
    expected = document_means(model, None, texts, settings, tokenizer)["distinct_1"].estimate().mean.item()
    assert found["second"] == pytest.approx(expected, abs=1e-6) != found["first"]


# --- summaries and records ---


@pytest.mark.filterwarnings("error")
def test_summary_of_two_models():
    means = {
        name: {"loss": DocumentMean(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + shift, torch.ones(2))}
        | {"cross_entropy/all": DocumentMean(torch.tensor([2.0, 2.0]) + shift, torch.ones(2))}
        for name, shift in (("a", 0.0), ("b", 0.5))
    }
    rows = {(r["model"], r["measure"], r["length"]): r["mean"] for r in summarise(means, {"loss": (1, 8)})}
    assert rows["a", "loss", 1] == 2 and rows["b", "loss", 8] == 3.5
    assert rows["b - a", "loss", 1] == pytest.approx(0.5) == rows["b - a", "cross_entropy/all", None]
    assert rows["a", "perplexity/all", None] == pytest.approx(7.389, abs=1e-3)
    assert ("b - a", "perplexity/all", None) not in rows, "a difference of cross-entropies is no cross-entropy"


def test_pairs_that_are_left_out_are_named_once():
    """Not of the same contexts, or measured of one model alone: there is no pair, and one warning says which."""
    whole, half = DocumentMean(torch.ones(2), torch.ones(2)), DocumentMean(torch.ones(2), torch.tensor([1.0, 0.0]))
    measured = {name: {"loss": whole, "distinct_4": distinct_4} for name, distinct_4 in (("a", whole), ("b", half))}
    measured["c"] = {"loss": whole, "distinct_4": whole, "self_bleu": whole}
    with pytest.warns(UserWarning, match=r"^4 paired difference\(s\) left out") as warned:
        rows = summarise(measured, {})
    (text,) = (str(warning.message) for warning in warned)
    missing = ("b - a: distinct_4", "c - a: self_bleu", "c - b: distinct_4", "c - b: self_bleu")
    assert text.endswith(f"({'; '.join(missing)})")
    pairs = {(row["model"], row["measure"]) for row in rows if " - " in row["model"]}
    assert pairs == {(pair, "loss") for pair in ("b - a", "c - a", "c - b")} | {("c - a", "distinct_4")}


def test_records_go_on_where_they_stopped(tmp_path):
    path = tmp_path / "records" / "a.jsonl"
    file = RecordFile(path, {"seed": 0, "lengths": (1, 2)})
    file.append([{"id": 4, "loss": [[0.5], 1.0]}, {"id": 7, "loss": [[0.25], 1.0]}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # cut off in the middle of a line
    again = RecordFile(path, {"seed": 0, "lengths": [1, 2]})
    assert 4 in again and 7 not in again
    again.append([{"id": 7, "loss": [[0.25], 1.0]}])
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="other settings \\(seed 0 -> 1\\)"):
        RecordFile(path, {"seed": 1, "lengths": [1, 2]})
    assert json.loads(whole.splitlines()[1])["id"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(measures=("cross_entropy", "bleu")), "metrics=.*bleu.*use some of cross_entropy"),
        (dict(lengths=(4, 2)), r"lengths=\[4, 2\]"),
        (dict(num_generations=1), "num_generations=1"),
        (dict(temperature=0.0), "temperature=0"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_settings_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        DocumentSettings(**change)


@pytest.mark.parametrize("name", ["cross_entropy", "calibration"])
def test_numbers_that_are_none_are_refused(models, documents, name):
    broken = tiny_model()
    broken.config.name_or_path = "runs/broken"
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"runs/broken: .* of a document is NaN or infinite"):
        measured(broken, models[1], documents, replace(SETTINGS, measures=(name,)))


def test_perplexities_beyond_all_floats_are_left_out():
    huge = {"cross_entropy/all": DocumentMean(torch.tensor([800.0, 800.0]), torch.ones(2))}
    (row,) = summarise({"a": huge}, {})
    assert (row["measure"], row["mean"]) == ("cross_entropy/all", 800.0)
