"""Feature-matching loss of documents under other kernels: one rollout, one length and one pair at a time."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import held_out
import oracles
from ebft import FeatureNetwork
from ebft.evaluation import DocumentSettings, document_means, feature_matching
from ebft.evaluation.batches import batches_of
from ebft.evaluation.contexts import contexts_of
from ebft.evaluation.document_measures import NO_OTHERS, measure_documents, prompt_groups
from ebft.evaluation.feature_matching import fixed_kernels, measure_of
from ebft.evaluation.report import check_folder
from ebft.evaluation.settings import KERNELS
from ebft.kernels import KERNELS as EVERY_KERNEL
from ebft.noise import EVALUATION, sampling_uniforms
from ebft.rollout import sample_rollouts
from step_oracle import kernel_of
from tiny_models import tiny_model

LENGTHS = (1, 2, 4)
SETTINGS = DocumentSettings(
    ("feature_matching",),
    LENGTHS,
    KERNELS,
    num_generations=3,
    contexts_per_document=3,
    context_length=3,
    seed=5,
    batch_size=2,
)


@pytest.fixture(scope="module")
def models():
    return held_out.model_and_network()


@pytest.fixture(scope="module")
def documents():
    return held_out.raw_documents()


@pytest.fixture(autouse=True)
def few_frequencies(monkeypatch):
    """The oracle takes each of them by itself."""
    monkeypatch.setattr(feature_matching, "FREQUENCIES", 5)


def last_feature(phi, ids):
    return oracles.token_features(phi, [1, 2, 3], ids)[-1]


def places(documents, settings=SETTINGS):
    """The tokens before each context, and from it on, document by document."""
    for document in documents:
        (batch,) = batches_of([document], 1, "cpu")
        ids, layout = torch.tensor(document["input_ids"]), contexts_of(batch, settings)
        yield [(ids[:a], ids[a : a + max(LENGTHS)]) for a in layout.anchors[layout.valid].tolist()]


@torch.no_grad()
def slow_bandwidth(phi, documents) -> float:
    every = []
    for length in LENGTHS:
        features = [
            last_feature(phi, torch.cat([prefix, text[:length]])).tolist()
            for contexts in places(documents)
            for prefix, text in contexts
        ]
        every += [math.dist(x, y) for i, x in enumerate(features) for y in features[:i]]
    return sorted(every)[(len(every) - 1) // 2]


def loops(name: str, record: dict, length: int):
    """The kernel of a record, without n-grams longer than a completion."""
    if name == "ngram":
        return partial(oracles.kernel_value, name=name, sizes=[m for m in record["sizes"] if m <= length])
    return kernel_of(record)


@torch.no_grad()
def points_of(phi, prefix, completions, length: int, name: str) -> list:
    """What a kernel compares: tokens, or the feature of the last one."""
    if name == "ngram":
        return [completion[:length] for completion in completions]
    return [last_feature(phi, torch.cat([prefix, completion[:length]])) for completion in completions]


def test_names_are_those_of_training():
    assert ("linear", *KERNELS) == EVERY_KERNEL


@torch.no_grad()
def test_losses_one_by_one(models, documents):
    model, phi = models
    found = document_means(model, FeatureNetwork(phi), documents, SETTINGS)
    records = fixed_kernels(FeatureNetwork(phi), documents, SETTINGS)
    (batch,) = batches_of(documents, 8, "cpu")
    layout = contexts_of(batch, SETTINGS)
    noise = sampling_uniforms(layout, batch["document_ids"], 3, seed=5, purpose=EVALUATION, step=0)
    tokens = sample_rollouts(model, batch["input_ids"], layout, 3, temperature=1.0, uniforms=noise).tokens
    for name in KERNELS:
        assert found[measure_of("loss", name)].counts.tolist() == [3, 3, 2, 0]
        for row, contexts in enumerate(places(documents)):
            expected = np.zeros(len(LENGTHS))
            for k, (prefix, text) in enumerate(contexts):
                for column, length in enumerate(LENGTHS):
                    points = points_of(phi, prefix, [*tokens[row, k], text], length, name)
                    kernel = loops(name, records[name], length)
                    expected[column] += oracles.mmd_u_statistic(points[:-1], points[-1], kernel)
            np.testing.assert_allclose(found[measure_of("loss", name)].sums[row], expected, rtol=0, atol=2e-5)


def test_kernels_are_of_the_documents_and_the_network(models, documents):
    _, phi = models
    network = FeatureNetwork(phi, pooling="mean_pooling")
    records = fixed_kernels(network, documents, SETTINGS)
    bandwidth = records["rbf"]["bandwidth"]
    assert bandwidth == pytest.approx(slow_bandwidth(phi, documents), rel=1e-6)
    assert records["rbf"] == {"name": "rbf", "bandwidth": bandwidth, "scales": [1.0]}
    assert records["energy"] == {"name": "energy"} and records["ngram"] == {"name": "ngram", "sizes": [1, 2, 3]}
    of_seed = {name: records["characteristic"][name] for name in ("bandwidth", "frequencies", "features", "seed")}
    assert of_seed == {"bandwidth": bandwidth, "frequencies": 5, "features": 96, "seed": 5}
    assert json.loads(json.dumps(records)) == records
    assert fixed_kernels(network, documents, replace(SETTINGS, batch_size=1, num_generations=7)) == records
    assert fixed_kernels(network, documents, replace(SETTINGS, kernels=())) == {}
    assert network.pooling == "mean_pooling"


def test_other_kernels_change_nothing_else(models, documents):
    """The inner product's losses, and those of one kernel without the others."""
    model, phi = models
    every = document_means(model, FeatureNetwork(phi), documents, SETTINGS)
    for kernels in ((), ("energy",), ("characteristic", "ngram")):
        found = document_means(model, FeatureNetwork(phi), documents, replace(SETTINGS, kernels=kernels))
        assert list(found) == ["feature_matching_loss", *(f"feature_matching_loss/{name}" for name in kernels)]
        for name, value in found.items():
            assert torch.equal(value.sums, every[name].sums) and torch.equal(value.counts, every[name].counts)


def test_losses_do_not_depend_on_batches(models, documents):
    model, phi = models
    one, other = (
        document_means(model, FeatureNetwork(phi), documents, replace(SETTINGS, batch_size=size)) for size in (1, 4)
    )
    for name in one:
        torch.testing.assert_close(one[name].sums, other[name].sums, rtol=0, atol=1e-6)


# --- several references of one prompt ---


def asked(prompts: int, references: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(prompts):
        prompt = torch.randint(3, 61, (5,), generator=generator).tolist()
        for _ in range(references):
            answer = torch.randint(3, 8, (4,), generator=generator).tolist()
            rows.append({"input_ids": [*prompt, *answer], "completion_mask": [0] * 5 + [1] * 4, "loss_mask": [1] * 9})
    return [row | {"document_id": i} for i, row in enumerate(rows)]


@torch.no_grad()
def test_floor_and_what_is_above_it(models):
    """The references' variance under each kernel: the mean of k(y, y) minus that of k(y, y'), pair by pair."""
    model, phi = models
    rows, settings = asked(prompts=2, references=3), replace(SETTINGS, contexts_per_document=1)
    found = document_means(model, FeatureNetwork(phi), rows, settings)
    records = fixed_kernels(FeatureNetwork(phi), rows, settings)
    for name in KERNELS:
        loss, floor, shared, excess = (found[measure_of(x, name)] for x in ("loss", "floor", "shared", "excess"))
        for i in range(2):
            texts = [torch.tensor(row["input_ids"]) for row in rows[3 * i : 3 * i + 3]]
            expected = []
            for length in LENGTHS:
                points = points_of(phi, texts[0][:5], [ids[5:] for ids in texts], length, name)
                K = oracles.kernel_matrix(points, loops(name, records[name], length))
                pairs = [K[a, b] for a in range(3) for b in range(3) if a != b]
                expected.append(K.trace() / 3 - sum(pairs) / 6)
            np.testing.assert_allclose(floor.sums[i], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(shared.sums, loss.sums / 3)
        torch.testing.assert_close(excess.sums, shared.sums - floor.sums)
        assert floor.counts.tolist() == [1, 1]
    assert (found["feature_matching_floor/energy"].sums[:, -1] > 0.1).all(), "the test could not see it"


@torch.no_grad()
def test_a_model_matches_its_own_rollouts_under_every_kernel(monkeypatch):
    """Above the floor is the squared MMD of the two distributions: 0 within its interval, and not of another model."""
    monkeypatch.setattr(feature_matching, "FREQUENCIES", 64)
    model, phi, n = tiny_model(seed=2), FeatureNetwork(tiny_model(seed=5, scale=3.0)), 8
    prompts = asked(prompts=60, references=1)
    (batch,) = batches_of(prompts, 60, "cpu")
    settings = replace(SETTINGS, contexts_per_document=1, batch_size=64, num_generations=4)
    options = dict(temperature=1.0, generator=torch.Generator().manual_seed(3))
    tokens = sample_rollouts(model, batch["input_ids"], contexts_of(batch, settings), n, **options).tokens
    rows = [
        row | {"input_ids": [*row["input_ids"][:5], *answer]}
        for row, answers in zip(prompts, tokens[:, 0].tolist(), strict=True)
        for answer in answers
    ]
    rows = [row | {"document_id": i} for i, row in enumerate(rows)]
    own, other = (document_means(m, phi, rows, settings) for m in (model, tiny_model(seed=8, scale=12.0)))
    for name in KERNELS:
        excess, floor = (own[measure_of(x, name)].estimate() for x in ("excess", "floor"))
        width = excess.high - excess.low
        assert (excess.mean.abs() < width).all() and (width < floor.mean).all(), name
        assert (other[measure_of("excess", name)].estimate().low > 0)[-1], f"{name}: another model is told apart"


# --- settings, and results of before ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(kernels=("linear",)),
            r"kernels=\['linear'\]: use each of rbf, energy, characteristic, ngram at most once",
        ),
        (dict(kernels=("rbf", "rbf")), "at most once"),
        (dict(kernels=("rbf",), measures=("cross_entropy",)), "needs feature_matching among the metrics"),
    ],
)
def test_settings_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_curves_are_named():
    lengths = {name: axis for name, axis in SETTINGS.axes.items() if axis == LENGTHS}
    parts, kernels = ("loss", "shared", "floor", "excess"), ("linear", *KERNELS)
    assert set(lengths) == {measure_of(part, kernel) for part in parts for kernel in kernels}
    assert measure_of("loss", "linear") == "feature_matching_loss"
    assert measure_of("loss", "rbf") == "feature_matching_loss/rbf"


def test_no_bandwidth_is_refused_with_what_to_do(models, documents):
    with pytest.raises(ValueError, match=r"^kernels: the median .* is nan, .*: give more documents, or leave these"):
        document_means(
            *models[:1], FeatureNetwork(models[1]), documents[2:], replace(SETTINGS, contexts_per_document=1)
        )


def test_without_kernels_none_is_measured(models, documents):
    """Records are made of the kernels that are given; settings alone name them."""
    groups = prompt_groups(documents)
    settings = replace(SETTINGS, kernels=())
    ((first, *_), *_) = measure_documents(models[0], FeatureNetwork(models[1]), groups, settings, None, NO_OTHERS)
    assert set(first) == {"id", "feature_matching_loss"}


def test_results_of_before_there_were_kernels_go_on(tmp_path):
    before = {"num_samples": 1, "best_of": 1, "generation_engine": "transformers", "seed": 3}
    (tmp_path / "results.json").write_text(json.dumps({"config": before}))
    check_folder(tmp_path, before | {"kernels": []})
    with pytest.raises(ValueError, match=r"kernels \[\] -> \['rbf'\]"):
        check_folder(tmp_path, before | {"kernels": ["rbf"]})
