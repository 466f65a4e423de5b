"""How a kernel is fixed before training, from the first documents alone, and how a resumed run gets it back."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

import oracles
from ebft import FeatureNetwork, scoring
from ebft.scoring import kernel_of, kernel_record, resumed_kernel, spread, typical_distance
from training import config, documents, small_model, trainer

ROWS = documents([23, 17, 5, 30, 6, 12, 3, 26, 21])
PROMPTED = documents([23, 17, 5, 30, 6, 12, 3, 26, 21], prompts=[9, 2, 3, 11, 5, 4, 1, 13, 6])


def made(tmp_path, rows=ROWS, **settings):
    return trainer(small_model(scale=8.0), rows, tmp_path, settings=settings)


@torch.no_grad()
def slow_bandwidth(rows, args, documents_used=32, blocks_used=8) -> float:
    """Reference blocks one by one, each in a run of its own; every pair of distances, in plain Python."""
    network, groups, used = FeatureNetwork(small_model(scale=8.0)), {}, 0
    for row in rows:
        answer = row.get("completion_mask", [1] * len(row["input_ids"]))
        first = answer.index(1) if "completion_mask" in row else args.context_length
        last = len(row["input_ids"]) - args.completion_length
        anchors = [a for a in range(first, last + 1, args.stride) if a >= args.context_length]
        if not anchors or used == documents_used:
            continue
        used += 1
        kept = {math.ceil(i * len(anchors) / blocks_used) for i in range(blocks_used)}
        for anchor in [a for i, a in enumerate(anchors) if i in kept or len(anchors) <= blocks_used]:
            ids = torch.tensor(row["input_ids"][: anchor + args.completion_length])
            tokens = oracles.token_features(network.model, network.layer_indices, ids)[-args.completion_length :]
            pooled = oracles.pool(tokens, args.pooling)
            for place, feature in enumerate(pooled if args.pooling == "token" else [pooled]):
                groups.setdefault(place, []).append(feature.tolist())
    every = [math.dist(x, y) for group in groups.values() for i, x in enumerate(group) for y in group[:i]]
    return sorted(every)[(len(every) - 1) // 2]


@pytest.mark.parametrize("pooling", ["last_token", "mean_pooling", "concat", "token"])
@pytest.mark.parametrize("rows", [ROWS, PROMPTED], ids=["text", "prompts"])
def test_bandwidth_is_the_median_distance_of_references(tmp_path, rows, pooling):
    ours = made(tmp_path, rows, kernel="rbf", pooling=pooling, kernel_scales=[0.5, 2.0])
    expected = slow_bandwidth(rows, ours.args)
    assert ours.kernel_record["bandwidth"] == pytest.approx(expected, rel=1e-6)
    assert ours.scorer.kernel.bandwidths == pytest.approx((0.5 * expected, 2 * expected), rel=1e-6)


@pytest.mark.parametrize(("documents_used", "blocks_used"), [(3, 8), (32, 2), (4, 3)])
def test_only_the_first_documents_and_some_of_their_blocks(tmp_path, monkeypatch, documents_used, blocks_used):
    monkeypatch.setattr(scoring, "DOCUMENTS", documents_used)
    monkeypatch.setattr(scoring, "BLOCKS_OF_A_DOCUMENT", blocks_used)
    ours = made(tmp_path, kernel="rbf", stride=2)
    assert ours.kernel_record["bandwidth"] == pytest.approx(
        slow_bandwidth(ROWS, ours.args, documents_used, blocks_used), rel=1e-6
    )


def test_blocks_are_spread_over_the_document():
    valid = torch.tensor([[True] * 10, [True] * 3 + [False] * 7, [False] * 10])
    kept = spread(valid, 4)
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 3, 5, 8], [0, 1, 2], []]


def test_bandwidth_is_of_documents_and_network_alone(tmp_path):
    """Not of how a step is cut up, of the order or the seed of training, or of what a visit takes of a document."""
    plain = made(tmp_path, kernel="rbf").kernel_record
    others = dict(per_device_train_batch_size=2, seed=5, max_blocks=1, random_anchor_offset=True, temperature=1.0)
    others |= dict(train_sampling_strategy="random", num_generations=2)
    assert made(tmp_path, kernel="rbf", **others).kernel_record == plain
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert made(tmp_path, stream, kernel="rbf").kernel_record == plain
    assert made(tmp_path, ROWS[::-1], kernel="rbf").kernel_record["bandwidth"] == pytest.approx(plain["bandwidth"])
    assert made(tmp_path, ROWS[3:], kernel="rbf").kernel_record != plain


def test_a_given_bandwidth_reads_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "typical_distance", None)
    assert made(tmp_path, kernel="rbf", kernel_bandwidth=0.7).kernel_record["bandwidth"] == 0.7
    assert made(tmp_path, kernel="energy").kernel_record == {"name": "energy"}
    assert made(tmp_path).kernel_record == {"name": "linear"}


def test_a_stream_starts_where_it_would(tmp_path):
    """Its first documents are read for the bandwidth, and trained on all the same."""
    seen = {}
    for kernel in ("linear", "rbf"):
        stream = IterableDataset.from_generator(lambda: iter(ROWS))
        ours = made(tmp_path / kernel, stream, kernel=kernel, per_device_train_batch_size=3, max_steps=2)
        seen[kernel] = [batch["document_ids"].tolist() for batch in ours.get_train_dataloader()]
    assert seen["rbf"] == seen["linear"] != []


def test_without_training_documents_those_of_the_evaluation(tmp_path):
    evaluation = {"one": Dataset.from_list(ROWS), "other": Dataset.from_list(ROWS[:1])}
    ours = trainer(small_model(scale=8.0), None, tmp_path, settings=dict(kernel="rbf"), eval_dataset=evaluation)
    assert ours.kernel_record == made(tmp_path, kernel="rbf").kernel_record


def test_nothing_is_scored_and_no_kernel_made_without_rollouts(tmp_path):
    ours = made(tmp_path, rl_coef=0.0, kernel="rbf")
    assert ours.scorer is None and ours.kernel_record is None and ours.feature_network is None


def test_ngrams_load_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("ebft.feature_models.load_feature_network", None)
    ours = made(tmp_path, kernel="ngram")
    assert ours.feature_network is None and ours.feature_network_record is None
    assert ours.kernel_record == {"name": "ngram", "sizes": [1, 2, 3]}


def test_no_distance_is_refused(tmp_path):
    one_block = documents([8])
    with pytest.raises(ValueError, match=r"kernel_bandwidth: .* first 1 document\(s\) .* is nan, .*: set it"):
        made(tmp_path, one_block, kernel="rbf")
    alike = [{"input_ids": [5] * 9}] * 4
    with pytest.raises(ValueError, match=r"kernel_bandwidth: .* first 4 document\(s\) .* is 0.0, .*: set it"):
        made(tmp_path, alike, kernel="rbf", stride=40)
    made(tmp_path, one_block, kernel="rbf", kernel_bandwidth=1.0)
    with pytest.raises(ValueError, match=r"first 0 document\(s\)"):
        typical_distance(FeatureNetwork(small_model()), [], "kernels", "give more")


def test_a_long_stream_without_blocks_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_READ", 20)
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"input_ids": [5, 6, 7]}

    with pytest.raises(ValueError, match="kernel_bandwidth"):
        made(tmp_path, IterableDataset.from_generator(endless), kernel="rbf")
    assert len(read) < 3000  # they are tokenised a thousand at a time


# --- frequencies ---


def test_frequencies_are_those_of_the_record(tmp_path):
    settings = dict(kernel="characteristic", kernel_frequencies=7, kernel_scales=[1.0, 2.0])
    ours = made(tmp_path, seed=3, **settings)
    record = ours.kernel_record
    assert {**record, "bandwidth": 0, "sha256": 0} == {
        "name": "characteristic",
        "bandwidth": 0,
        "scales": [1.0, 2.0],
        "frequencies": 7,
        "features": 96,
        "seed": 3,
        "sha256": 0,
    }
    bandwidths = np.array([record["bandwidth"] * (1 + m % 2) for m in range(7)])
    drawn = np.random.Generator(np.random.PCG64([3, 5])).standard_normal((7, 96))
    np.testing.assert_allclose(ours.scorer.kernel.frequencies, drawn.T / bandwidths, rtol=1e-15)
    assert torch.equal(kernel_of(record).frequencies, ours.scorer.kernel.frequencies)
    assert made(tmp_path, seed=4, **settings).kernel_record["sha256"] != record["sha256"]
    assert made(tmp_path, seed=3, pooling="concat", **settings).kernel_record["features"] == 3 * 96
    with pytest.raises(ValueError, match="seed 3 does not give the frequencies of the checkpoint any more"):
        kernel_of(record | {"sha256": "other"})


# --- what a resumed run goes on with ---

RBF = {"name": "rbf", "bandwidth": 0.5, "scales": [1.0]}
FOURIER = {"name": "characteristic", "bandwidth": 0.5, "scales": [1.0], "frequencies": 8, "features": 96, "seed": 0}
FREE, GIVEN = SimpleNamespace(kernel_bandwidth=None), SimpleNamespace(kernel_bandwidth=0.5)


@pytest.mark.parametrize(
    ("record", "ours"),
    [
        (None, {"name": "linear"}),  # of before there was a choice
        (RBF, RBF),
        (RBF, RBF | {"bandwidth": 0.6}),
        (FOURIER | {"sha256": "a"}, FOURIER | {"bandwidth": 0.6, "sha256": "b"}),
        ({"name": "ngram", "sizes": [1, 2]}, {"name": "ngram", "sizes": [1, 2]}),
    ],
)
def test_the_checkpoints_kernel_is_taken(record, ours):
    assert resumed_kernel(record, ours, FREE, "there") == (record or ours)


@pytest.mark.parametrize(
    ("record", "ours", "args", "names"),
    [
        (None, RBF, FREE, "'name': 'linear'"),
        (RBF, {"name": "linear"}, FREE, "'name': 'rbf', 'scales'"),
        (RBF, {"name": "energy"}, FREE, "'name': 'energy'"),
        (RBF, RBF | {"scales": [2.0]}, FREE, r"'scales': \[1.0\]"),
        (RBF | {"bandwidth": 0.4}, RBF, GIVEN, "'bandwidth': 0.4"),
        (FOURIER, FOURIER | {"frequencies": 9}, FREE, "'frequencies': 8"),
        (FOURIER, FOURIER | {"seed": 1}, FREE, "'seed': 0"),
        ({"name": "ngram", "sizes": [1, 2]}, {"name": "ngram", "sizes": [2]}, FREE, r"'sizes': \[1, 2\]"),
    ],
)
def test_another_kernel_is_refused(record, ours, args, names):
    with pytest.raises(ValueError, match=r"='there' was trained with the kernel .*: resume with that one") as refused:
        resumed_kernel(record, ours, args, "there")
    refused.match(names)


def test_the_record_is_of_the_settings():
    args = config("unused", kernel="rbf", kernel_scales=[1.0, 3.0])
    record = kernel_record("rbf", bandwidth=0.25, features=96, **args.kernel_parameters)
    assert record == {"name": "rbf", "bandwidth": 0.25, "scales": [1.0, 3.0]}
    assert kernel_of(record).bandwidths == (0.25, 0.75)
