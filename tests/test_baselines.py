"""SFT and RLVR on TRL's trainers: the documents, files and names of EBFT, and rewards that tell right from wrong."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from sacrebleu.metrics.bleu import BLEU
from torch.multiprocessing import spawn
from transformers import AutoTokenizer, TrainerControl, TrainerState

from ebft.baselines.kept import advantage
from ebft.baselines.rewards import UnitTests, bleu, make_reward
from ebft.baselines.rlvr import prompts_of
from ebft.callbacks import TrainingClock
from ebft.cli import main
from ebft.compare.cells import Cell
from ebft.data import load_documents, tokenize_documents
from sandboxes import STRONGEST, sandbox
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

ROWS = [
    {
        "prompt": f"# add {i % 5}\ndef f(x):\n",
        "completion": f"    return x + {i % 5}\n",
        "tests": f"assert f(1) == {1 + i % 5}",
        "entry_point": "f",
    }
    for i in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint with a byte-level tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "tiny", byte_bpe_tokenizer()
    tiny_model(seed=0, vocab_size=len(tokenizer), dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory with documents, and a reward of somebody's own."""
    monkeypatch.chdir(tmp_path)
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("text.jsonl").write_text("".join(json.dumps({"text": row["completion"]}) + "\n" for row in ROWS))
    Path("untested.jsonl").write_text(json.dumps({"prompt": "a b c d", "completion": " e"}) + "\n")
    Path("rewards_of_mine.py").write_text(
        "import asyncio\n"
        "door = asyncio.Event()\n"
        "async def open_doors():\n"
        "    door.set()\n"
        "    await door.wait()\n"
        "def shorter(prompts, completions, reference, **columns):\n"
        "    assert all(text.startswith('    return') for text in reference)\n"
        "    return [-len(text) / 100 for text in completions]\n"
        "async def shorter_later(prompts, completions, **columns):\n"
        "    await asyncio.wait_for(open_doors(), 5)\n"
        "    return shorter(prompts, completions, **columns)\n"
        "number = 3\n"
    )
    return tmp_path


def train(model, *words: str, output: str, steps: int = 3) -> int:
    sizes = ["--max_length", "64", "--max_steps", str(steps), "--per_device_train_batch_size", "2"]
    sizes += ["--gradient_accumulation_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--report_to", "none"]
    data = [] if "--dataset_name" in words else ["--dataset_name", "qa.jsonl"]
    return main(["train", "--model_name_or_path", str(model), *data, *sizes, "--output_dir", output, *words])


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_sft_takes_the_steps_that_our_trainer_takes_without_rollouts(model, workplace):
    assert train(model, "--method", "sft", output="sft") == 0
    assert train(model, "--rl_coef", "0", "--ce_coef", "1", output="ours") == 0
    theirs, ours = metrics("sft"), metrics("ours")
    assert len(theirs) == len(ours) == 3
    for one, other in zip(theirs, ours, strict=True):
        for name in ("ce_loss", "grad_norm", "num_tokens", "learning_rate", "step", "epoch"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert ours[0]["ce_loss"] - ours[-1]["ce_loss"] > 0.1


def test_sft_evaluates_the_held_out_split_of_ebft(model, workplace):
    held_out = ("--eval_split_size", "4", "--eval_strategy", "steps", "--eval_steps", "1")
    assert train(model, "--method", "sft", *held_out, output="sft", steps=1) == 0
    assert train(model, "--rl_coef", "0", "--ce_coef", "1", *held_out, output="ours", steps=1) == 0
    (one,), (other,) = ([r for r in metrics(name) if "eval_ce_loss" in r] for name in ("sft", "ours"))
    assert one["eval_ce_loss"] == pytest.approx(other["eval_ce_loss"], rel=1e-3)


def test_sft_resumed_is_the_unbroken_run(model, workplace):
    assert train(model, "--method", "sft", output="whole", steps=4) == 0
    assert train(model, "--method", "sft", "--save_steps", "2", output="part", steps=2) == 0
    assert train(model, "--method", "sft", "--resume_from_checkpoint", "last", output="part", steps=4) == 0
    part, whole = (
        # TRL counts tokens anew after a resume.
        [{k: v for k, v in r.items() if k != "num_tokens"} for r in metrics(name) if "grad_norm" in r]
        for name in ("part", "whole")
    )
    assert part == whole


def test_rlvr_learns_what_a_reward_of_ones_own_asks_for(model, workplace):
    words = ("--method", "rlvr", "--reward", "rewards_of_mine.shorter", "--max_completion_length", "8")
    assert train(model, *words, "--num_generations", "8", "--temperature", "1", output="rlvr", steps=12) == 0
    found = metrics("rlvr")
    first, last = (sum(record["reward"] for record in part) / 4 for part in (found[:4], found[8:12]))
    assert last > first + 0.01
    names = {"reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens", "loss", "grad_norm"}
    assert names <= found[0].keys()
    timing = [json.loads(line) for line in Path("rlvr", "timing.jsonl").read_text().splitlines()]
    assert timing[1]["step_time"] > 0 and timing[1]["tokens_per_second"] > 0
    assert [path.name for path in sorted(Path("rlvr", "rollouts").iterdir())] == [
        "step_000001.parquet",
        "step_000010.parquet",
    ]
    rows = pq.read_table("rlvr/rollouts/step_000010.parquet").to_pylist()
    assert len(rows) == 4 * 8 and [row["rollout"] for row in rows] == [*range(8)] * 4
    assert statistics.mean(row["reward"] for row in rows) == pytest.approx(found[9]["reward"], rel=1e-4)
    for first in range(0, 32, 8):
        group = rows[first : first + 8]
        assert group[0]["context"] == ROWS[group[0]["document_id"]]["prompt"]
        assert group[0]["reference"] == ROWS[group[0]["document_id"]]["completion"]
        expected = [r["reward"] - statistics.mean(o["reward"] for o in group if o is not r) for r in group]
        assert [row["advantage"] for row in group] == pytest.approx(expected)
    assert all("".join(row["token_texts"]) == row["completion"] for row in rows)


def test_a_reward_may_be_a_coroutine(model, workplace):
    words = ("--method", "rlvr", "--max_completion_length", "8", "--num_generations", "4")
    for name in ("shorter", "shorter_later"):
        assert train(model, *words, "--reward", f"rewards_of_mine.{name}", output=name, steps=2) == 0
    one, other = ([r["reward"] for r in metrics(name) if "reward" in r] for name in ("shorter", "shorter_later"))
    assert len(one) == 2 and one == other


def test_completions_of_an_evaluation_are_not_kept(model, workplace):
    words = ("--method", "rlvr", "--reward", "rewards_of_mine.shorter", "--max_completion_length", "8")
    words += ("--eval_dataset_name", "qa.jsonl", "--eval_strategy", "steps", "--eval_steps", "1")
    assert train(model, *words, "--rollout_save_steps", "1", output="rlvr", steps=2) == 0
    for step in (1, 2):
        rows = pq.read_table(f"rlvr/rollouts/step_{step:06d}.parquet").to_pylist()
        assert statistics.mean(row["reward"] for row in rows) == pytest.approx(metrics("rlvr")[2 * step - 2]["reward"])
    assert advantage(None, [None, 1.0]) is None and advantage(1.0, [1.0, None]) is None
    assert advantage(1.0, [1.0, None, 0.5]) == 0.5


def test_settings_of_a_run_can_be_given_again(model, workplace):
    assert train(model, "--method", "sft", output="first", steps=2) == 0
    settings = yaml.safe_load(Path("first", "resolved_config.yaml").read_text())
    assert settings["method"] == "sft" and "stride" not in settings
    assert main(["train", "--config", "first/resolved_config.yaml", "--output_dir", "again"]) == 0
    assert metrics("again")[0]["ce_loss"] == metrics("first")[0]["ce_loss"]


def test_prompts_are_the_tokens_that_ebft_sees(model, workplace):
    tokenizer, rows = AutoTokenizer.from_pretrained(model), load_documents("qa.jsonl")
    kept = prompts_of(rows, tokenizer, 64, "train_dataset")
    documents = tokenize_documents(rows, tokenizer, max_length=64)
    for prompt, document in zip(kept["prompt"], documents, strict=True):
        ids = tokenizer(text=prompt)["input_ids"]
        assert document["input_ids"][: len(ids)] == ids and document["completion_mask"][len(ids) - 1 :][:2] == [0, 1]
    longest = max(len(tokenizer(text=row["prompt"])["input_ids"]) for row in ROWS)
    with pytest.raises(ValueError, match="no prompt is shorter than max_length=2"):
        prompts_of(rows, tokenizer, 2, "train_dataset")
    assert len(prompts_of(rows, tokenizer, longest + 1, "train_dataset")) == len(rows)


@pytest.mark.parametrize("layer", STRONGEST)
def test_unit_tests_reward_right_programs_alone(layer):
    completions = [
        "    return x + 0\n",
        "    return x - 1\n",
        "    return (\n",
        "    return x\n",
        "    while True: pass\n",
    ]
    columns = {name: [ROWS[0][name]] * 5 for name in ("tests", "entry_point")}
    reward = UnitTests(sandbox(layer))
    assert reward([ROWS[0]["prompt"]] * 5, completions, **columns, trainer_state=None) == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("layer", STRONGEST)
def test_unit_tests_need_tests_in_every_row(layer):
    with pytest.raises(ValueError, match="train_dataset, row 1: the field `tests`"):
        UnitTests(sandbox(layer)).check([ROWS[0], {"prompt": "x"}], "train_dataset")


def test_bleu_is_sacrebleus_of_the_first_line():
    references, texts = [["the old cat sat down", "an old cat sat"]], ["the old cat sat\nand more"]
    expected = BLEU(effective_order=True).sentence_score("the old cat sat", references[0]).score / 100
    assert bleu(["x"], texts, references=references, reference=["other"]) == [pytest.approx(expected)]
    assert bleu(["x"], ["other\n"], reference=[" other"]) == [pytest.approx(1.0)]
    assert make_reward("bleu") is bleu


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "ppo"), "method: got 'ppo'; give one of ebft, sft, rlvr"),
        (("--method", "rlvr"), "reward: missing; method rlvr needs unit_tests, bleu"),
        (("--method", "sft", "--stride", "4"), "stride=4 does nothing with method: sft; remove it"),
        (("--method", "sft", "--reward", "bleu"), "reward: got bleu, which does nothing without method: rlvr"),
        (
            ("--max_completion_length", "9"),
            "does nothing without method: rlvr or rollout: completion",
        ),
        (("--method", "rlvr", "--reward", "bleu", "--ce_coef", "1"), "ce_coef=1.0 does nothing with method: rlvr"),
        (("--method", "rlvr", "--reward", "speed"), "reward='speed' is unknown: use unit_tests, bleu"),
        (("--method", "rlvr", "--reward", "rewards_of_mine.speed"), "cannot be imported"),
        (("--method", "rlvr", "--reward", "rewards_of_mine.number"), "is no function"),
        (("--method", "rlvr", "--reward", "bleu", "--num_generations", "1"), "num_generations=1"),
        (("--method", "rlvr", "--reward", "bleu", "--dataset_name", "text.jsonl"), "text without prompts has none"),
        (("--method", "rlvr", "--reward", "bleu", "--per_device_train_batch_size", "7"), "12 prompts, but one update"),
        (("--max_train_seconds", "0"), "max_train_seconds: got 0.0; give seconds above 0"),
        pytest.param(
            ("--method", "rlvr", "--reward", "unit_tests", "--dataset_name", "untested.jsonl"),
            "train_dataset, row 0: the field `tests` is missing",
            marks=pytest.mark.skipif(not STRONGEST, reason="needs a sandbox"),
        ),
    ],
)
def test_what_cannot_be_used_is_refused(model, workplace, capsys, words, message):
    assert train(model, *words, output="out") == 2
    assert message in capsys.readouterr().err
    assert not Path("out", "metrics.jsonl").exists()


def test_a_plan_is_of_ebft_alone(model, workplace, capsys):
    assert main(["plan", "--model_name_or_path", str(model), "--method", "sft"]) == 2
    assert "`ebft plan` knows what EBFT costs" in capsys.readouterr().err


def test_a_budget_of_seconds_ends_the_training(model, workplace):
    for method in ("sft", "ebft"):
        clock = ("--max_train_seconds", "1e-6", "--save_seconds", "1e-6", "--save_steps", "999")
        assert train(model, "--method", method, *clock, output=method, steps=9) == 0
        assert [record["step"] for record in metrics(method) if "grad_norm" in record] == [1]
        cell = Cell(method, "", 0, {"max_train_seconds": 1e-6, "save_seconds": 1e-6}, Path(method))
        assert [path.name for path in cell.checkpoints()] == ["checkpoint-1"] and cell.is_trained()


def test_an_adapter_says_of_which_revision_its_base_is(model, workplace):
    words = ("--method", "sft", "--use_peft", "--model_revision", "abc")
    assert train(model, *words, output="adapted", steps=1) == 0
    assert json.loads(Path("adapted", "adapter_config.json").read_text())["revision"] == "abc"


def test_a_budget_goes_on_after_a_resume():
    budget, state, control = TrainingClock(100.0), TrainerState(), TrainerControl()
    state.stateful_callbacks = {"TrainingClock": {"args": {}, "attributes": {"spent": 99.999}}}  # type: ignore[reportAttributeAccessIssue]
    state.global_step = 3
    budget.on_train_begin(None, state, control)
    budget.on_step_begin(None, state, control)
    assert budget.spent == 99.999
    budget._began -= 1.0
    budget.on_step_end(SimpleNamespace(save_strategy="steps"), state, control)
    assert control.should_save, "as behind the last step"
    assert control.should_training_stop and budget.state()["attributes"]["spent"] > 100


def decide(rank: int, folder: Path) -> None:
    """What a clock of each of two processes decides, step by step; those of the second take twice as long."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    clock, control, decided = TrainingClock(10.0, every=5.0), TrainerControl(), []
    for _ in range(6):
        control.should_save = False
        clock.on_step_begin(None, TrainerState(), control)
        clock._began -= 2.0 * (1 + rank)
        clock.on_step_end(SimpleNamespace(save_strategy="no"), TrainerState(), control)
        decided.append((control.should_save, control.should_training_stop))
    (folder / f"{rank}.json").write_text(json.dumps(decided))
    dist.destroy_process_group()


def test_all_processes_go_by_one_clock(tmp_path):
    """Each by its own, one would save while the other goes on with the next step, and both would wait for ever."""
    spawn(decide, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [save for save, _ in first] == [False, False, True, False, True, True]
    assert [end for _, end in first] == [False] * 4 + [True] * 2
