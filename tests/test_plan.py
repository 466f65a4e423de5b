"""`ebft plan`: the method's arithmetic, what a run really does, the refusals of training; and no weights are read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, Qwen2Config

from ebft import BlockLayout, document_and_block_log_probs, footprint, planning
from ebft.cli import main
from ebft.cli.plan import HELP
from ebft.logprobs import LogProbs
from ebft.rollout import sample_and_sum
from ebft.sizes import network_shape
from tiny import byte_bpe_tokenizer

METHOD = planning.Method(rollouts=4, completion_length=8)
SIZES = dict(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
)


def save_model(folder: Path, config, weights: bool = True) -> Path:
    byte_bpe_tokenizer(chat_template=True).save_pretrained(folder)
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a model, the same without weights, others that do not fit, and ten documents."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", Qwen2Config(**SIZES))
    save_model(tmp_path / "bare", Qwen2Config(**SIZES), weights=False)
    save_model(tmp_path / "alibi", BloomConfig(vocab_size=320, hidden_size=16, n_layer=2, n_head=2))
    other = save_model(tmp_path / "other", Qwen2Config(**SIZES | {"vocab_size": 300}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    tokenizer = byte_bpe_tokenizer()
    tokenizer.eos_token = None
    shutil.copytree(tmp_path / "model", tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    rows = [{"text": f"Number {i} is followed by {i + 1}, which is larger." * (1 + i % 2)} for i in range(9)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "Short."}]))
    Path("pairs.jsonl").write_text(
        '{"prompt": "What is two and two? ", "completion": "Two and two is four, of course."}\n'
    )
    Path("short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("nothing.jsonl").write_text("")
    Path("columns.jsonl").write_text('{"txt": "misnamed"}\n')
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").touch()
    return tmp_path


def options(model: str = "bare", data: str | None = "my.jsonl") -> list[str]:
    words = ["--model_name_or_path", model, "--max_length", "64", "--use_cpu", "--report_to", "none"]
    return words + (["--dataset_name", data] if data else [])


@pytest.fixture
def plan(workplace, capsys):
    """Plan with some options, as parsed JSON."""

    def planned(*words: str, model: str = "bare", data: str | None = "my.jsonl") -> dict:
        status = main(["plan", *options(model, data), "--json", *words])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return planned


def test_token_forwards_of_the_papers_setting():
    document = planning.Documents.of_length(1024, 8, 8, 8, None)
    (size,) = document.sizes
    assert size.blocks == 127
    without = planning.token_forwards(size, METHOD)
    assert without == {
        "sampling": 4580,
        "features": 3816,
        "update": 13740,
        "total": 22136,
        "sft": 3072,
        "ratio": 22136 / 3072,
    }
    checkpointed = planning.token_forwards(size, METHOD, checkpointing=True)
    assert (checkpointed["update"], checkpointed["total"], checkpointed["sft"]) == (18320, 26716, 4096)
    reused = planning.Method(rollouts=4, completion_length=8, reuse=True)
    one_forward = planning.token_forwards(size, reused)
    assert (one_forward["update"], one_forward["total"], one_forward["sft"]) == (2 * 4580, 17556, 3072)
    assert planning.token_forwards(size, reused, checkpointing=True) == checkpointed, "nothing to reuse"
    with_reference = planning.Method(rollouts=4, completion_length=8, reference=True)
    assert planning.token_forwards(size, with_reference)["total"] == 22136 + 4580


def test_plain_cross_entropy_costs_what_sft_costs():
    work = planning.Documents.of_length(1024, 8, 8, 8, max_blocks=0).sizes[0]
    for method in (METHOD, replace(METHOD, reuse=True)):
        cost = planning.token_forwards(work, method)
        assert cost == {"update": 3072, "total": 3072, "sft": 3072, "ratio": 1}


def test_frozen_weights_need_no_gradient_of_their_own():
    work = planning.Work(tokens=100, blocks=0, prefixes=0, pairs=0)
    adapter = planning.Method(rollouts=4, completion_length=8, trained=0.0)
    assert planning.token_forwards(work, adapter)["update"] == 200


@settings(max_examples=60, deadline=None)
@given(*(st.integers(1, 12) for _ in range(3)), st.integers(0, 60))
def test_regular_documents_are_those_of_the_layout(stride, context, completion, more):
    layout = BlockLayout(context + completion + more, stride, context, completion)
    size = planning.Documents.of_length(layout.length, stride, context, completion, None).sizes[0]
    assert size.blocks == layout.num_blocks
    assert size.prefixes == layout.anchors.sum()


def test_operations_are_those_of_the_attention_mask():
    layout = BlockLayout(length=20, stride=3, context_length=4, completion_length=5)
    work = planning.Documents.of_length(20, 3, 4, 5, None).sizes[0]
    attention_only = planning.Network(layers=1, hidden=0, queries=1, keys=1, inner=0, vocabulary=0, matrices=0)
    method = planning.Method(rollouts=2, completion_length=5)
    operations = planning.operations(work, method, attention_only, attention_only, checkpointing=False)
    assert operations["features"] == 4 * layout.attention_mask(2).sum()


def test_operations_count_each_product_of_an_update():
    work = planning.Documents.of_length(20, 3, 4, 5, None).sizes[0]
    network = planning.Network(layers=1, hidden=3, queries=0, keys=1, inner=0, vocabulary=7, matrices=11)
    packed = work.tokens + METHOD.decoded(work.blocks)
    layers, head = 2 * 11 * packed, 2 * 3 * 7 * packed

    def update(checkpointing=False, **changes):
        return planning.operations(work, replace(METHOD, **changes), network, network, checkpointing)["update"]

    assert update() == 3 * layers + 3 * head
    assert update(reuse=True) == 2 * layers + 3 * head
    assert update(checkpointing=True, reuse=True) == 4 * layers + 3 * head
    assert update(linear=False) == 3 * layers + 4 * head, "the logits once more in the backward"
    assert update(trained=0.0) == 2 * layers + 2 * head


def test_plan_shows_whether_one_forward_samples_and_trains(plan):
    def shown(*words):
        planned = plan(*words)
        costs = planned["token-forwards"]
        ratios = [costs[way]["update"] / costs[way]["sampling"] for way in costs]
        return planned["settings"]["reuse_sampling_forward"], ratios

    one, two = [2, 4], [3, 4]  # passes without and with checkpointing
    assert shown() == (True, one)
    assert shown("--gradient_checkpointing") == (False, one)
    assert shown("--reuse_sampling_forward", "false") == (False, two)
    assert shown("--completion_length", "17") == (False, two), "too many keys to keep"
    assert shown("--memory", "80") == (False, two), "for a GPU"
    assert shown("--memory", "80", "--reuse_sampling_forward", "true") == (True, one)
    assert shown("--beta", "0.1") == (True, one)
    assert shown("--beta", "0.1", "--kl_estimator", "k3") == (False, two)


def test_updates_are_those_of_a_run(plan, capsys):
    words = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--num_train_epochs", "2"]
    data = plan(*words)["data"]
    assert plan(*words, "--max_steps", "7")["data"]["updates"] == 7
    assert main(["train", *options("model"), *words, "--output_dir", "run"]) == 0, capsys.readouterr().err
    state = json.loads(max(Path("run").glob("checkpoint-*")).joinpath("trainer_state.json").read_text())
    assert data["updates"] == state["global_step"] == 6
    assert data["updates per epoch"] == 3
    assert planning.optimiser_steps(10, 2, 2, 1, 1.0, -1) == (3, 3)


def test_documents_and_blocks_are_counted(plan):
    data = plan()["data"]
    rows = Path("my.jsonl").read_text().splitlines()
    lengths = [len(byte_bpe_tokenizer()(json.loads(line)["text"])["input_ids"]) + 1 for line in rows]
    lengths = [part for n in lengths for part in ([64, n - 64] if n > 64 else [n])]
    blocks = [max(0, (n - 16) // 8 + 1) for n in lengths]
    assert data["documents"] == data["rows"] == len(lengths)
    assert data["documents without a block"] == blocks.count(0) > 0
    assert data["tokens per document"] == {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": 64}
    assert data["blocks per document"] == {"min": 0, "mean": sum(blocks) / len(blocks), "max": max(blocks)}

    packed = plan("--packing")
    assert packed["data"]["rows"] < len(lengths)
    for name in ("documents", "tokens per document", "blocks per document"):
        assert packed["data"][name] == data[name], "no block crosses documents"

    assert plan("--max_blocks", "2")["data"]["blocks per document"]["max"] == 2
    assert plan("--rl_coef", "0")["token-forwards"]["with checkpointing"]["ratio"] == 1


def test_completions_are_where_the_blocks_are(plan):
    small = ["--stride", "4", "--completion_length", "4", "--context_length", "4"]
    inside, all_over = (plan(*small, *more, data="pairs.jsonl") for more in ([], ["--anchors", "all"]))
    assert inside["settings"]["anchors"] == "completion"
    assert inside["update"]["blocks"] < all_over["update"]["blocks"]


@pytest.mark.parametrize("words", [[], ["--dataset_streaming", "--max_steps", "5"]])
def test_what_cannot_be_counted_is_planned_for_full_documents(plan, words):
    planned = plan(*words, data="my.jsonl" if words else None)
    assert planned["data"]["documents"] is None
    assert "not counted" in planned["data"]["note"]
    assert planned["data"]["updates"] == (5 if words else None)
    assert planned["update"]["document tokens"] == 16 * 64
    assert planned["update"]["blocks"] == 16 * 7


def test_parameters_and_static_memory_are_those_of_the_models(plan):
    full = plan("--beta", "0.1")
    size = AutoModelForCausalLM.from_pretrained("model").num_parameters()
    assert full["model"]["parameters"] == full["model"]["trained parameters"] == size
    memory = full["memory"]
    assert memory["weights"] == memory["gradients"] == memory["reference model"] == 4 * size
    assert memory["AdamW state"] == 8 * size
    assert full["model"]["feature layers"] == [1, 2, 3]
    assert memory["feature network"] < memory["weights"], "it ends at its top tap"

    adapter = plan("--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--beta", "0.1")
    trained = 4 * 2 * (16 + 16 + 16 + 8)  # layers, rank, in and out of both
    assert adapter["model"]["trained parameters"] == trained
    assert adapter["memory"]["AdamW state"] == 8 * trained
    assert adapter["memory"]["feature network"] == adapter["memory"]["reference model"] == 0
    assert adapter["settings"]["learning_rate"] == 1e-5

    named = plan("--feature_model_name_or_path", "bare", "--feature_layers", "1", "--bf16", "true")
    assert named["model"]["feature network"] == "bare"
    assert named["memory"]["feature network"] == 2 * (320 * 16 + 2 * 16 + (size - 2 * 320 * 16 - 16) / 4 - 16)


def test_kernels_cost_nothing_and_ngrams_no_features(plan):
    linear = plan("--kernel", "linear")
    for kernel in ("rbf", "energy", "characteristic"):
        other = plan("--kernel", kernel)
        assert other["settings"].pop("kernel") == kernel and other["settings"].pop("whitening") == "none"
        assert {name: other[name] for name in linear if name not in ("settings", "fit")} == {
            name: linear[name] for name in linear if name not in ("settings", "fit")
        }
    ngram = plan("--kernel", "ngram")
    assert ngram["model"]["feature network"] is None and ngram["memory"]["feature network"] == 0
    for name in ("without checkpointing", "with checkpointing"):
        theirs, ours = linear["token-forwards"][name], ngram["token-forwards"][name]
        assert ours["total"] == pytest.approx(theirs["total"] - theirs.pop("features"))
        assert ours.keys() == theirs.keys()
    operations = linear["time"]["operations per update"]
    assert "in features" in linear["memory"] and "in features" not in ngram["memory"]
    without = operations.pop("features")
    expected = operations | {"total": operations["total"] - without}
    assert ngram["time"]["operations per update"] == pytest.approx(expected)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("way", ["one forward", "two forwards", "checkpointing"])
def test_activations_are_what_autograd_keeps(bf16, way):
    config = Qwen2Config(**SIZES | dict(hidden_size=128, intermediate_size=352, num_attention_heads=4, head_dim=32))
    model = AutoModelForCausalLM.from_config(config).train()
    if way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = BlockLayout(length=128, stride=8, context_length=8, completion_length=8)
    documents = torch.randint(320, (1, layout.length))
    tokens = torch.randint(320, (1, layout.num_blocks, 4, 8))
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    def weigh(rollouts):  # when all of the decoder's activations are there, and none of the head's
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
        return LogProbs(torch.zeros(1, 127), torch.zeros(rollouts.tokens.shape))

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        if way == "one forward":
            sample_and_sum(model, documents, layout, 4, weigh)
        else:
            document_and_block_log_probs(model, documents, tokens, layout)
            sizes.append(sum(storage.nbytes() for storage in kept.values()))
    run = footprint.Footprint(
        footprint.Weights(policy=0, trained=sum(p.numel() for p in model.parameters())),
        replace(METHOD, reuse=way == "one forward"),
        network_shape(model.base_model),
        bf16=bf16,
        checkpointing=way == "checkpointing",
    )
    memory = run.memory(planning.Documents.of_length(128, 8, 8, 8, None).largest_row, 1)
    hidden = 4 * 128 * (128 + layout.num_blocks * 4 * 7)  # bytes of the hidden states of all tokens
    gathered = 0 if way == "one forward" else hidden  # the head's rows
    planned = memory["activations"] + gathered + (memory["bf16 copies of weights"] if bf16 else 0)
    if way == "checkpointing":  # the layer that is being computed again comes on top in the backward
        planned = (4 + 2) * hidden + gathered
        assert memory["activations"] > planned
    assert sizes[0] == pytest.approx(planned, rel=0.05)


def test_time_needs_a_rate(plan):
    assert plan()["time"]["note"] == "unknown: give --calibrate, or --flops"
    slow, fast = (plan("--flops", rate)["time"] for rate in ("1e12", "2e12"))
    assert slow["seconds per update"]["total"] == 2 * fast["seconds per update"]["total"] > 0
    assert "assumed: matrix products at 1e+12 FLOP/s" in slow["note"]


def test_a_batch_that_does_not_fit_is_said_with_what_does(plan):
    def planned(rows, gib):
        return plan(
            "--memory", str(gib), "--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", "2"
        )

    room = planned(3, 1)["memory"]["total"] * 1.001 / 2**30
    fit = planned(8, room)["fit"]
    assert fit["fits"].startswith("NO: ") and fit["memory taken from"] == "--memory"
    assert fit["largest that fits"] == 3
    change = "set per_device_train_batch_size: 2 with gradient_accumulation_steps: 8 (the same update)"
    assert fit["to make it fit"] == change
    smaller = planned(2, room)["fit"]
    assert smaller["fits"].startswith("yes: ") and smaller["to make it fit"] is None


def test_room_is_that_of_this_machine(plan):
    fit = plan()["fit"]
    assert fit["memory taken from"] == "available RAM" and fit["fits"].startswith("yes: ")
    assert fit["largest that fits"] > fit["per_device_train_batch_size"] == 4


def test_memory_must_be_positive(workplace, capsys):
    assert main(["plan", *options(), "--memory", "0"]) == 2
    assert "error: memory: got 0.0; give the memory of one device in GiB" in capsys.readouterr().err


def test_tables_show_what_json_says(workplace, capsys):
    assert main(["plan", *options()]) == 0
    text = capsys.readouterr().out
    shown = (
        "settings",
        "tokens per document",
        "without checkpointing",
        "in sampling",
        "largest that fits",
        "or --flops",
    )
    for word in (*shown, "[1, 2, 3]"):
        assert word in text


def test_plan_leaves_nothing_behind(plan):
    before = sorted(Path().rglob("*"))
    plan()
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_generations", "1"], "num_generations=1"),
        (["--completion_length", "60"], "completion_length=60"),
        (["--max_length", "256"], "exceeds the model's 128 positions"),
        (["--dataset_name", "short.jsonl"], "all 2 documents are too short"),
        (["--dataset_name", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--dataset_name", "nothing.jsonl"], "nothing.jsonl"),
        (["--dataset_name", "columns.jsonl"], "txt"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--model_name_or_path", "./absent"], "absent"),
        (["--model_name_or_path", "alibi"], "ALiBi"),
        (["--model_name_or_path", "endless"], "eos_token"),
        (["--attn_implementation", "flash_attention_2"], "flash_attention_2"),
        (["--dtype", "bfloat16"], "dtype=bfloat16"),
        (["--feature_model_name_or_path", "other"], "feature_model_name_or_path='other'"),
        (["--feature_model_name_or_path", "alibi"], "ALiBi"),
        (["--feature_layers", "9"], "feature_layers"),
        (["--use_peft", "--lora_target_modules", "nonsense"], "nonsense"),
        (["--output_dir", "taken"], "holds another run"),
        (["--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "nothing to evaluate on"),
        (["--dataset_streaming"], "max_steps: missing"),
        (["--strde", "3"], "did you mean stride?"),
        (["--warmup_ratio", "0.1"], "warmup_ratio no longer exists"),
    ],
)
def test_plan_refuses_what_training_refuses(workplace, capsys, words, message):
    errors = []
    for verb in ("train", "plan"):
        assert main([verb, *options("model"), *words]) == 2
        error = capsys.readouterr().err
        errors.append(error[error.index("error: ") :])
    assert message in errors[0]
    assert errors[0] == errors[1]


def test_flops_must_be_positive(workplace, capsys):
    assert main(["plan", *options(), "--flops", "-1"]) == 2
    assert "error: flops: got -1.0; give the matrix rate" in capsys.readouterr().err


def test_help_says_how_to_plan_for_a_gpu():
    assert "--bf16 true --use_cpu" in HELP and "--memory 80" in HELP
