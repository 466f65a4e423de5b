"""The benchmark: its baseline computes what ours computes, its counts are the paper's, its command line works."""

import csv
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers.utils import logging

from benchmarks import counts, options, plot, published
from benchmarks.__main__ import main, parser, read_sweeps, read_workloads
from benchmarks.arms import ARMS, Bench, Options, Ours, Published, Reused
from benchmarks.report import ratios_of, write_csv
from benchmarks.shapes import SETTINGS, Workload
from benchmarks.timing import Case
from ebft import FeatureNetwork, document_and_block_log_probs
from ebft.planning import Method
from ebft.rollout import sample_rollouts
from ebft.sizes import network_shape
from tiny_models import tiny_model

SMALL: dict[str, Any] = dict(max_length=26, context_length=3, stride=4, num_generations=3, batch=2)
WORKLOADS = [
    Workload(**SMALL, completion_length=4),
    Workload(**SMALL, completion_length=1),
    Workload(**SMALL, completion_length=5, pooling="mean_pooling", micro_batch=2),
]
PAPER = Workload(**SETTINGS["qa"])


@pytest.fixture(autouse=True)
def verbosity():
    """The command line quietens transformers; other tests are not to notice."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


# Small enough for the command line to be done in a second or two.
ARGS = ["--vocab", "64", "--max_length", "24", "--batch", "2", "--repeats", "1"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_baseline_computes_what_the_library_computes(family, workload):
    model, layout, N = tiny_model(family), workload.layout(), workload.num_generations
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (2, workload.max_length), generator=noise)
    uniforms = torch.rand(2, layout.num_blocks, N, workload.completion_length, generator=noise)
    tokens = published.sample(model, ids, layout, uniforms, 0.6)
    features = published.features(model, ids, tokens, layout, pooling=workload.pooling)
    document, blocks = published.log_probs(model, ids, tokens, layout, 0.6)

    assert torch.equal(tokens, sample_rollouts(model, ids, layout, N, temperature=0.6, uniforms=uniforms).tokens)
    expected = FeatureNetwork(model, pooling=workload.pooling)(ids, tokens, layout)
    torch.testing.assert_close(features, expected)
    expected = document_and_block_log_probs(model, ids, tokens, layout, temperature=0.6)
    torch.testing.assert_close(document, expected.document.repeat_interleave(N, 0))
    torch.testing.assert_close(blocks, expected.blocks)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_both_arms_make_the_same_step(workload):
    results = []
    for kind in (Published, Ours, Reused):
        arm = kind(Bench(Options(vocab=64), longest=64), workload)
        arm.bench.policy.double()
        arm.bench.feature_model.double()
        arm.prepare()
        if kind is not Reused:
            arm.sampling()
            arm.features()
            arm.rewards()
            expected = objective(arm)
        loss = arm.update()
        torch.testing.assert_close(loss.double(), expected)
        gradients = [p.grad for p in arm.bench.trained]
        results.append((arm.tokens, arm.embedded, arm.advantages, loss, gradients, arm.bench.trained))
    baseline, ours, reused = results
    assert all(torch.equal(a, b) for a, b in zip(baseline[0], ours[0], strict=True))
    torch.testing.assert_close(baseline[1:5], ours[1:5])
    torch.testing.assert_close(ours[3:5], reused[3:5])
    for other in (ours, reused):
        torch.testing.assert_close([p.detach() for p in baseline[5]], [p.detach() for p in other[5]])


@torch.no_grad()
def objective(arm) -> torch.Tensor:
    """The mixed objective of a whole batch of equal documents, by its definition."""
    ids, tokens, advantages = (torch.cat(x) for x in (arm.documents, arm.tokens, arm.advantages))
    document, blocks = document_and_block_log_probs(arm.bench.policy, ids, tokens, arm.layout, temperature=0.6)
    return -(advantages[..., None] * blocks).mean() - 0.03 * document.mean()


def test_dense_mask_is_the_layouts_definition():
    layout = WORKLOADS[0].layout()
    P, K, G = layout.length, layout.num_blocks, layout.completion_length
    packing = published.pack(layout, torch.device("cpu"))
    # Step-major order against (block, step) order.
    order = torch.cat([torch.arange(P), P + torch.arange(K * G).view(K, G).T.flatten()])
    assert torch.equal(packing.mask[0, 0], layout.attention_mask(1)[order][:, order])
    assert torch.equal(packing.position_ids[0], layout.position_ids(1)[order])


def test_token_forwards_are_those_of_the_published_scheme():
    counted = published.token_forwards(PAPER.work(), Method(4, 8), checkpointing=True)
    assert counted == {"sampling": 46992, "features": 8160, "update": 32640, "total": 87792}


def test_counts_of_the_other_arms():
    bench = Bench(Options(vocab=64), longest=64)
    assert counts.forwards("ours", PAPER, bench)["total"] == 22136
    assert counts.forwards("ours_reused", PAPER, bench)["total"] == 22136 - 4580
    assert counts.forwards("sft", PAPER, bench)["total"] == 3 * 1024
    policy = network_shape(bench.lm.base_model)
    assert (policy.layers, policy.matrices) == (4, 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024))
    assert network_shape(bench.network.decoder).layers == 3
    assert counts.needed_linear_operations("ours", PAPER, bench) == 2 * policy.matrices * 22136
    assert counts.needed_operations("ours", PAPER, bench) == counts.needed_operations("published", PAPER, bench)


def test_a_batch_that_is_too_large_is_noted():
    bench = Bench(Options(vocab=64), longest=64)
    huge = Workload(batch=10**7, micro_batch=10**7)
    assert "lower micro_batch" in (counts.memory_note("published", huge, bench) or "")
    assert counts.memory_note("published", WORKLOADS[0], bench) is None


def test_command_line_writes_table_csv_json_and_plot(tmp_path, capsys):
    arguments = [*ARGS, "--output", str(tmp_path), "--sweep", "max_length=20"]
    main([*arguments, "--setting", "qa", "translation"])
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    # Five rows of each scheme by stage, two of the others, for each setting; the sweep is of ours.
    assert len(lines) == 2 * (5 + 5 + 2 + 2) + 5
    assert {line["arm"] for line in lines if line["group"] == "qa"} == set(ARMS)
    assert {line["completion_length"] for line in lines if line["group"] == "translation"} == {"4"}
    assert all(float(line["seconds_min"]) <= float(line["seconds"]) <= float(line["seconds_max"]) for line in lines)
    assert all(line["torch"] == torch.__version__ and line["machine"] and line["dtype"] == "float32" for line in lines)

    run = json.loads((tmp_path / "run.json").read_text())
    qa = {(row["arm"], row["stage"]): row for row in run["rows"] if row["group"] == "qa"}
    stages = [qa["ours", stage]["seconds"] for stage in ("sampling", "features", "rewards", "update")]
    assert qa["ours", "total"]["seconds"] == pytest.approx(sum(stages))
    assert qa["ours", "update"]["tokens_per_second"] == pytest.approx(2 * 24 / qa["ours", "update"]["seconds"])
    assert qa["published", "update"]["peak_mib"] > qa["sft", "update"]["peak_mib"] > 0
    ratios = {row["ratio"]: row for row in run["ratios"] if row["group"] == "qa"}
    update = ratios["speed-up, update"]
    assert update["median"] == pytest.approx(qa["published", "update"]["seconds"] / qa["ours", "update"]["seconds"])
    assert (tmp_path / "cost.png").stat().st_size > 1000
    assert "price of ours / SFT's update" in capsys.readouterr().out

    main([*ARGS, "--output", str(tmp_path), "--arms", "sft"])  # appends
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(lines) + 1 + 2


def test_lora_bfloat16_and_checkpointing_run(tmp_path):
    options = ["--lora", "2", "--dtype", "bfloat16", "--gradient_checkpointing", "--micro_batch", "1"]
    options += ["--generation_batch", "2"]
    main([*ARGS, *options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert {row["arm"] for row in rows} == set(ARMS) - {"ours_reused"}, "it keeps what checkpointing would not"


def test_ratios_are_those_of_the_seconds():
    """Of made-up seconds: every ratio has the numbers it names."""
    bench, w = Bench(Options(vocab=64), longest=64), WORKLOADS[0]
    times = {
        "published": dict(sampling=[20.0], features=[3.0], rewards=[0.0], update=[7.0]),
        "ours": dict(sampling=[2.0], features=[1.0], rewards=[0.0], update=[2.0]),
        "ours_reused": dict(update=[4.0]),
        "sft": dict(update=[0.5]),
    }
    peaks = {
        arm: {stage: int(10 * seconds[0]) or 1 for stage, seconds in stages.items()} for arm, stages in times.items()
    }
    arms = {arm: Case("qa", arm, w, stages, peaks[arm]) for arm, stages in times.items()}
    found = {row["ratio"]: row["median"] for row in ratios_of("qa", arms, bench)}
    assert found == {
        "speed-up, sampling": 10,
        "speed-up, features": 3,
        "speed-up, update": 3.5,
        "speed-up, whole update, two forwards": 6,
        "speed-up, whole update, two forwards, with the release's own extra passes": 36 / 5,
        "peak memory, sampling": 10,
        "peak memory, features": 3,
        "peak memory, rewards": 1,
        "peak memory, update": 3.5,
        "peak memory, largest stage": 10,
        "speed-up, whole update, reused forward": 7.5,
        "peak memory, reused forward": 5,
        "price of ours / SFT's update": 10,
        "price of ours_reused / SFT's update": 8,
        "price of published / SFT's update": 60,
    }


def test_csv_of_another_version_is_left_alone(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("other,columns\n1,2\n")
    assert write_csv(path, [{"a": 1}], {"b": 2}) == write_csv(path, [{"a": 3}], {"b": 4}) == tmp_path / "results_2.csv"
    assert path.read_text() == "other,columns\n1,2\n"
    assert (tmp_path / "results_2.csv").read_text().split() == ["a,b", "1,2", "3,4"]


def test_without_matplotlib_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.can_plot()
    main([*ARGS, "--arms", "sft", "--output", str(tmp_path)])
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "cost.png").exists()
    assert (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_length", "15"], "max_length=15 is too short for one block"),
        (["--arms", "theirs"], "invalid choice: 'theirs'"),
        (["--num_generations", "1"], "num_generations=1"),
        (["--batch", "3", "--micro_batch", "2"], "micro_batch=2"),
        (["--batch", "0"], "batch=0"),
        (["--repeats", "0"], "repeats=0"),
        (["--threads", "0"], "threads=0"),
        (["--device", "abacus"], "device=abacus is unknown"),
        (["--device", "cuda:99"], "device=cuda:99 is not available"),
        (["--sweep", "width"], "sweep=width is unknown"),
        (["--sweep", "stride=a"], "write whole numbers"),
        (["--sweep", "max_length=8"], "max_length=8 is too short"),
        (["--device", "meta"], "on cpu and cuda only"),
        (["--vocab", "0"], "vocab=0 must be at least 1"),
        (["--gradient_checkpointing", "--arms", "ours_reused"], "arms=ours_reused keeps"),
        (["--output", __file__], "File exists"),
        (["--attn_implementation", "flash_attention_2"], "attn_implementation"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_bad_input_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*ARGS, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_are_the_papers_and_can_be_overridden():
    workloads = read_workloads(parser().parse_args(["--setting", "translation", "--stride", "3", "--batch", "2"]))
    w = workloads["translation"]
    sizes = (w.context_length, w.stride, w.completion_length, w.num_generations)
    assert (*sizes, w.pooling, w.batch, w.max_length) == (4, 3, 4, 4, "mean_pooling", 2, 1024)
    sweeps = read_sweeps(["completion_length", "stride=5"], w)
    assert [x.completion_length for x in sweeps["completion_length"]] == [2, 4, 8, 16]
    assert [(x.stride, x.batch) for x in sweeps["stride"]] == [(5, 1)]
    (wider,) = read_sweeps(["stride=5"], w, documents=2)["stride"]
    assert (wider.batch, wider.micro_batch) == (2, 2)


def test_engine_and_benchmark_need_neither_trl_nor_datasets():
    code = """
import sys
sys.modules["trl"] = sys.modules["datasets"] = None
import benchmarks.__main__
from ebft import BlockLayout, FeatureNetwork, block_log_probs, document_and_block_log_probs, sample_blocks
from ebft import advantages, rewards
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_loss_curves_with_options_stay():
    """All but the compiled one, which takes long to begin; and what is compared does change with the noise."""
    names = [name for name in options.OPTIONS if name != "torch.compile"]
    curves = options.measure(names, steps=20, evaluations=2)
    assert len(curves["default"]) == 3 and curves["default"][-1] < curves["default"][0] - 0.1
    for name in names:
        assert options.furthest(curves[name], curves["default"]) <= options.OPTIONS[name][1], name
    assert options.furthest(curves["another seed"], curves["default"]) > 0.001


@pytest.mark.parametrize("words", ["faults --kills 1 --kinds full", "options --steps 10"])
def test_a_gpu_that_is_not_there_is_refused(words):
    """And not taken for the CPU, whose runs would be told of as the GPU's."""
    module, *options_given = words.split()
    command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cuda", *options_given]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
    assert done.returncode == 2 and "device=cuda: there is none here" in done.stderr
