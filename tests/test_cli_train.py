"""`ebft train` as a user runs it: train, resume, interrupt, several processes, and one line for unusable input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ebft.checkpoints import last_complete_checkpoint
from ebft.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny Qwen2 model and a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory with ten documents in it."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"The number {i} is followed by the number {i + 1}, which is larger."} for i in range(10)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tiny.yaml").write_text(
        "dataset_name: my.jsonl\nmax_length: 64\nstride: 16\nmax_steps: 2\nper_device_train_batch_size: 2\n"
        "gradient_accumulation_steps: 1\nuse_cpu: true\nreport_to: none\nsave_steps: 1\n"
    )
    return tmp_path


def test_train_with_a_model_and_a_file_then_resume(checkpoint, workplace, capsys):
    train = ["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint)]
    assert main(train) == 0, capsys.readouterr().err
    output = Path("runs/tiny-my")
    assert (output / "metrics.jsonl").is_file()
    trained = AutoModelForCausalLM.from_pretrained(output).state_dict()
    initial = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert any(not trained[name].equal(initial[name]) for name in initial)

    assert main(train) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main([*train, "--resume_from_checkpoint", "last", "--max_steps", "3"]) == 0, capsys.readouterr().err
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


KERNELS = {
    "rbf": ["--kernel_scales", "0.5", "2"],
    "energy": ["--pooling", "mean_pooling"],
    "characteristic": ["--kernel_frequencies", "8", "--kernel_bandwidth", "0.5"],
    "ngram": ["--ngram_sizes", "1", "4", "--use_peft"],
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_train_with_another_kernel_then_resume(checkpoint, workplace, capsys, kernel):
    words = ["--kernel", kernel, *KERNELS[kernel], "--eval_split_size", "4"]
    train = ["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words]
    assert main(train) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert f"Kernel: name {kernel}" in shown and ("Feature network:" in shown) == (kernel != "ngram")
    output = Path("runs/tiny-my")
    resolved = yaml.safe_load((output / "resolved_config.yaml").read_text())
    assert resolved["kernel"] == kernel and resolved["whitening"] == "none"
    card = (output / "README.md").read_text()
    assert f"- Kernel: name {kernel}" in card
    assert ("- Feature network: none (n-grams of token ids)" in card) == (kernel == "ngram")
    *_, evaluated = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    assert "eval_feature_matching_loss" in evaluated and "eval_rewards/alignment/mean" in evaluated
    assert main([*train, "--resume_from_checkpoint", "last", "--max_steps", "3"]) == 0, capsys.readouterr().err
    again = ["train", "--config", str(output / "resolved_config.yaml"), "--output_dir", "again"]
    assert main(again) == 0, capsys.readouterr().err
    assert yaml.safe_load(Path("again/resolved_config.yaml").read_text())["kernel"] == kernel


def test_lora_and_evaluation_on_held_out_documents(checkpoint, workplace, capsys):
    words = ["--use_peft", "--eval_strategy", "steps", "--eval_steps", "1", "--eval_split_size", "2"]
    status = main(["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words])
    assert status == 0, capsys.readouterr().err
    assert Path("runs/tiny-my/adapter_model.safetensors").is_file()
    assert "eval_" in Path("runs/tiny-my/metrics.jsonl").read_text()


def test_a_warning_is_one_line_said_once(checkpoint, workplace):
    words = ["--max_length", "32", "--model_name_or_path", str(checkpoint), "--eval_split_size", "5"]
    command = [sys.executable, "-m", "ebft", "train", "--config", "tiny.yaml", *words]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    split = [line for line in lines if "longer than max_length=32 split" in line]
    assert len(split) == 2
    assert split[0].startswith("warning: train_dataset: 5 document(s)")
    assert split[1].startswith("warning: eval_dataset: 5 document(s)")


def test_resolved_config_repeats_the_run(checkpoint, workplace, capsys):
    words = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--model_revision", "v1"]
    words += ["--dataset_train_split", "train[:8]", "--feature_layers", "0.5", "4"]
    Path("split").mkdir()
    Path("my.jsonl").rename("split/my.jsonl")
    words += ["--dataset_name", "split"]
    assert main(["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words]) == 0
    resolved = yaml.safe_load(Path("runs/tiny-split/resolved_config.yaml").read_text())
    assert resolved["lora_r"] == 2
    assert resolved["lora_alpha"] and resolved["seed"] == 42, "what decides a run, even where it is a default"
    assert main(["train", "--config", "runs/tiny-split/resolved_config.yaml", "--output_dir", "again"]) == 0
    again = yaml.safe_load(Path("again/resolved_config.yaml").read_text())
    assert again | {"output_dir": resolved["output_dir"]} == resolved
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert Path("again", name).read_bytes() == Path("runs/tiny-split", name).read_bytes()


def test_two_processes(checkpoint, workplace):
    command = [sys.executable, "-m", "ebft.cli", "train", "--config", "tiny.yaml", "--num_processes", "2"]
    result = subprocess.run(
        [*command, "--model_name_or_path", str(checkpoint), "--num_train_epochs", "1", "--max_steps", "-1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    last = max(Path("runs/tiny-my").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    # Ten documents, two processes with two documents each: three updates, where one process would need five.
    assert last.name == "checkpoint-3"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "your.jsonl"], "your.jsonl"),  # found before the launch
        (["--use_peft", "--lora_target_modules", "nonsense"], "nonsense"),  # found by both processes
    ],
)
def test_two_processes_say_once_what_is_wrong(checkpoint, workplace, words, message):
    train = ["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), "--num_processes", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "ebft", *train, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_interrupt_says_how_to_continue(checkpoint, workplace, processes):
    train = ["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), "--max_steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ebft", *train, "--num_processes", str(processes), "--save_total_limit", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # A shell's background jobs, this test perhaps among them, start with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and last_complete_checkpoint("runs/tiny-my") is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "stopped; continue with --resume_from_checkpoint last"
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "your.jsonl"], "your.jsonl"),
        (["--eval_dataset_name", "your.jsonl"], "eval_dataset_name='your.jsonl': no such file"),
        pytest.param(
            ["--report_to", "wandb"],
            "pip install 'ebft[wandb]'",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed"),
        ),
        (["--model_name_or_path", "damaged"], "(a damaged .safetensors file"),
        (["--dataset_name", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "give eval_dataset_name, or hold out"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint: runs/tiny-my holds no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: no folder nowhere"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
        (["--use_peft", "--lora_target_modules", "nonsense"], "nonsense"),
        (["--num_generations", "1"], "num_generations"),
        (["--kernel", "rbf", "--whitening", "paper"], "whitening='paper' is of inner products"),
    ],
)
def test_unusable_input_is_one_error_and_no_traceback(checkpoint, workplace, capfd, words, message):
    shutil.copytree(checkpoint, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"none")
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert main(["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert message in error[error.index("error: ") :]
    assert error[error.index("error: ") :].count("\n") == 1
