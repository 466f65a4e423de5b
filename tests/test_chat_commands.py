"""`ebft train` and `ebft evaluate` on a file of conversations, and the baselines on the same."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from trl.chat_template_utils import qwen3_chat_template

from ebft.cli import main
from ebft.data import load_documents, tokenize_documents
from ebft.evaluation.batches import batches_of
from ebft.evaluation.contexts import random_contexts
from tiny import CHAT_TEMPLATE, byte_bpe_tokenizer
from tiny_models import tiny_model

TURNS = [f"<think>hm {i}</think>two and two is four" for i in range(2)]
TALK = [m for turn in TURNS for m in ({"role": "user", "content": "two?"}, {"role": "assistant", "content": turn})]
TAGS = ("--reasoning_tags", "<think>", "</think>")
ANSWER = "two and two is four<|im_end|>"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny checkpoints: one with a template that marks turns and keeps history, one with Qwen3's."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_bpe_tokenizer()
    for name, template in (("chatml", CHAT_TEMPLATE), ("qwen3", qwen3_chat_template)):
        tiny_model(vocab_size=len(tokenizer), dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with six conversations of two turns each."""
    monkeypatch.chdir(tmp_path)
    write("chat.jsonl", [{"messages": TALK} for _ in range(6)])
    return tmp_path


def write(name: str, rows) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(model, *words: str, output="out") -> int:
    sizes = ["--max_length", "160", "--max_steps", "1", "--per_device_train_batch_size", "12", "--use_cpu"]
    sizes += ["--gradient_accumulation_steps", "1", "--report_to", "none"]
    words = ("--model_name_or_path", str(model), "--dataset_name", "chat.jsonl", "--output_dir", output, *words)
    return main(["train", *words, *sizes])


BLOCKS = ("--stride", "2", "--completion_length", "3", "--num_generations", "2", "--rollout_save_steps", "1")


@pytest.mark.parametrize("words", [(), ("--packing",), ("--dataset_streaming",)], ids=["rows", "packed", "streamed"])
def test_blocks_of_a_run_lie_in_every_turn(models, workplace, words):
    Path("tags.yaml").write_text("reasoning_tags: ['<think>', '</think>']\n")
    assert train(models / "chatml", "--config", "tags.yaml", *BLOCKS, *words) == 0
    tokenizer = byte_bpe_tokenizer()
    ids = tokenizer(ANSWER)["input_ids"]
    wanted = [tokenizer.decode(ids[k : k + 3]) for k in range(0, len(ids) - 2, 2)]
    rows = pq.read_table("out/rollouts/step_000001.parquet").to_pylist()
    found: dict[int, dict[int, str]] = {}
    for row in rows:
        found.setdefault(row["document_id"], {})[row["block"]] = row["reference"]
    assert sorted(found) == list(range(6))
    for blocks in found.values():
        assert [blocks[place] for place in sorted(blocks)] == wanted * 2
    assert all("</think>" in row["context"] for row in rows)


@pytest.mark.filterwarnings("ignore:train_dataset")
def test_qwen3_trains_each_turn_behind_its_own_history(models, workplace):
    assert train(models / "qwen3", *BLOCKS, *TAGS) == 0
    rows = pq.read_table("out/rollouts/step_000001.parquet").to_pylist()
    assert {row["document_id"] for row in rows} == set(range(12))
    first = {row["document_id"]: row["context"] for row in sorted(rows, key=lambda row: -row["block"])}
    assert all(context.endswith("</think>") and context.count("<think>") == 1 for context in first.values())
    assert all(("two and two is four" in context) == document % 2 for document, context in first.items())


@pytest.mark.parametrize("words", [(), ("--assistant_only_loss",), ("--split_turns", "true")])
@pytest.mark.parametrize("name", ["chatml", "qwen3"])
@pytest.mark.filterwarnings("ignore:train_dataset")
def test_sft_takes_the_step_that_ours_takes_on_the_same_conversations(models, workplace, words, name):
    assert train(models / name, *TAGS, *words, "--method", "sft", "--learning_rate", "1e-3", output="sft") == 0
    assert train(models / name, *TAGS, *words, "--rl_coef", "0", "--ce_coef", "1", "--learning_rate", "1e-3") == 0
    sft, ours = (json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[0]) for folder in ("sft", "out"))
    for value in ("ce_loss", "grad_norm", "num_tokens"):
        assert sft[value] == pytest.approx(ours[value], rel=1e-4), value


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (
            [{"messages": TALK}],
            ("--method", "rlvr", "--reward", "bleu"),
            "train_dataset holds `messages`: RLVR completes",
        ),
        (
            [{"prompt": TALK[:1], "completion": TALK[1:2]}],
            ("--method", "rlvr", "--reward", "bleu"),
            "`prompt` is list: for method: rlvr make it a string (of messages: what the chat template renders",
        ),
        (
            [{"messages": TALK}],
            ("--method", "rlvr", "--reward", "bleu", *TAGS),
            "reasoning_tags=['<think>', '</think>']",
        ),
        ([{"messages": TALK}], ("--reasoning_tags", "<think>"), "reasoning_tags=['<think>'] must be two strings"),
        ([{"messages": TALK[:1]}], (), "train_dataset, row 0: no message of `messages` has the role assistant"),
    ],
)
def test_one_line_says_what_is_wrong(models, workplace, capsys, rows, words, message):
    write("chat.jsonl", rows)
    assert train(models / "chatml", *words) == 2
    assert message in capsys.readouterr().err


def test_contexts_of_an_evaluation_lie_in_turns_and_not_at_their_ends(models, workplace):
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    options = dict(max_length=200, needs_turns=True, reasoning_tags=TAGS[1:])
    documents = list(tokenize_documents(load_documents("chat.jsonl"), tokenizer, **options))
    (batch,) = batches_of(documents, 8, "cpu")
    ids, G, drawn = tokenizer(ANSWER)["input_ids"], 3, set()
    for seed in range(60):
        layout = random_contexts(batch, 3, 1, G, seed)
        assert layout.valid.all() and layout.num_blocks == 3
        for row, places in enumerate(layout.references(batch["input_ids"])):
            assert places[0].tolist() == ids[:G], "the first place is right behind the reasoning"
            drawn |= {(row, tuple(reference)) for reference in places[1:].tolist()}
    inner = {tuple(ids[k : k + G]) for k in range(len(ids) - G)}  # without the last place
    assert drawn == {(row, reference) for row in range(6) for reference in inner}


@pytest.mark.filterwarnings("ignore:dataset_name", "ignore:lengths end")
def test_evaluate_conversations(models, workplace, capsys):
    sizes = ["--context_length", "1", "--lengths", "1", "2", "--num_generations", "2", "--plots", "false"]
    words = ["--dataset_name", "chat.jsonl", "--metrics", "cross_entropy", "feature_matching", *sizes]
    for name, units in (("chatml", 6), ("qwen3", 12)):
        model = ["--model_name_or_path", str(models / name), "--output_dir", name]
        assert main(["evaluate", *model, *words, *TAGS]) == 0, capsys.readouterr().err
        results = {row["measure"]: row for row in json.loads(Path(name, "results.json").read_text())["results"]}
        lines = Path(name, "records", f"{name}-documents.jsonl").read_text().splitlines()[1:]
        counts = [json.loads(line)["cross_entropy/answer"][1] for line in lines]
        answers = len(byte_bpe_tokenizer()(ANSWER)["input_ids"])
        if name == "chatml":
            assert sum(counts) == 6 * 2 * answers
        assert results["cross_entropy/answer"]["mean"] > 0 and "feature_matching_loss" in results
        assert sum(counts) >= units * answers


def test_evaluate_groups_documents_by_all_that_stands_before_an_answer(models, workplace):
    """Turns of one row have the row's prompt in common, and answers to one prompt do not have their reasoning."""
    turns = [{"prompt": TALK[:1], "completion": TALK[1:]} for _ in range(2)]
    thoughts = [{"prompt": "two?", "completion": f"<think>hm {i}</think>four"} for i in range(2)]
    for i, (rows, words, ids) in enumerate(
        ((turns, ("--split_turns", "true"), [0, 1]), (thoughts, (), [0]), (thoughts, TAGS, [0, 1]))
    ):
        write("chat.jsonl", rows)
        words = ("--dataset_name", "chat.jsonl", "--metrics", "cross_entropy", "--plots", "false", *words)
        model = ("--model_name_or_path", str(models / "chatml"), "--output_dir", str(i))
        assert main(["evaluate", *model, *words]) == 0
        lines = Path(str(i), "records/chatml-documents.jsonl").read_text().splitlines()[1:]
        assert [json.loads(line)["id"] for line in lines] == ids, "the first document of each group"
