"""The command line: help without torch, mistakes as one line and exit status 2, YAML and flags as in TRL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import ebft
from ebft.cli import VERBS, is_users_mistake, main
from ebft.cli.arguments import GONE, ArgumentParser, default_output_dir, parse, read_flags

REQUIRED = ["--model_name_or_path", "some/model", "--dataset_name", "some/data"]


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


@pytest.fixture
def write_yaml(tmp_path):
    """Write a YAML file and return the flags that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), ["nonsense"]])
def test_short_answers_import_no_torch(words):
    code = (
        "import sys; from ebft.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(); sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == (2 if words == ["nonsense"] else 0), result.stderr


def test_help_lists_every_verb_and_every_verb_has_examples(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb} " in overview
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: ebft {verb}")
        assert "examples:" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == ebft.__version__


def test_unknown_verb_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: unknown verb 'trian'; did you mean 'train'?")


def test_console_script_module_gives_the_exit_status():
    result = subprocess.run([sys.executable, "-m", "ebft.cli", "nonsense"], capture_output=True, check=False)
    assert result.returncode == 2


def test_mistake_is_one_line_and_traceback_on_request(capsys, monkeypatch):
    monkeypatch.delenv("EBFT_TRACEBACK", raising=False)
    assert main(["env", "--jsn"]) == 2
    assert capsys.readouterr().err == "error: unknown option --jsn; `ebft env` takes only --json\n"
    monkeypatch.setenv("EBFT_TRACEBACK", "0")  # restored afterwards, though --traceback sets it
    assert main(["env", "--jsn", "--traceback"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: unknown option")


def test_failure_inside_training_keeps_its_traceback():
    def error_from(module: str, inside_training: bool) -> ValueError:
        """A ValueError raised in a module of this name, with or without Trainer.train below it."""
        names = {"__name__": module}
        exec("def fail(): raise ValueError", names)
        names = {"__name__": "transformers.trainer", "fail": names["fail"]}
        exec("def train(): fail()\ndef __init__(): fail()", names)
        with pytest.raises(ValueError) as caught:
            names["train" if inside_training else "__init__"]()  # pyright: ignore[reportCallIssue]
        return caught.value

    assert is_users_mistake(error_from("transformers.modeling_utils", inside_training=False))
    assert is_users_mistake(error_from("ebft.data", inside_training=True))
    assert not is_users_mistake(error_from("torch.nn.functional", inside_training=True))


def test_env_as_json_and_as_tables(capsys):
    assert main(["env", "--json"]) == 0
    environment = json.loads(capsys.readouterr().out)
    assert environment["versions"]["ebft"] == ebft.__version__
    assert environment["machine"]["memory total GiB"] > 0
    assert main(["env"]) == 0
    assert environment["versions"]["torch"] in capsys.readouterr().out


def test_help_all_lists_every_option(capsys):
    assert main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    for option in ("--stride", "--learning_rate", "--lora_r", "--dataset_name", "--config"):
        assert option in text


def test_flags_override_yaml_and_both_override_defaults(write_yaml):
    recipe = "model_name_or_path: some/model\ndataset_name: some/data\nstride: 4\nlearning_rate: 1e-6\n"
    arguments = parse([*write_yaml(recipe), "--stride", "2", "--completion-length", "3"])
    assert arguments.training.stride == 2
    assert arguments.training.completion_length == 3
    assert arguments.training.learning_rate == 1e-6
    assert arguments.training.num_generations == 4
    assert arguments.model.model_name_or_path == "some/model"
    assert arguments.data.dataset_name == "some/data"


def test_yaml_means_what_the_same_flag_means(write_yaml, monkeypatch):
    monkeypatch.setenv("EBFT_TEST_VARIABLE", "before")
    recipe = (
        "eval_strategy: no\nreport_to: [none]\nmax_blocks: null\nlr_scheduler_kwargs: {a: 1}\npacking: true\n"
        "feature_layers: [0.5, 1]\nlora_target_modules: all-linear\nenv: {EBFT_TEST_VARIABLE: 1}\n"
    )
    data, training, model, _ = parse([*write_yaml(recipe), *REQUIRED])
    assert training.eval_strategy == "no"
    assert training.max_blocks is None
    assert training.lr_scheduler_kwargs == {"a": 1}
    assert training.packing is True
    assert list(training.feature_layers) == [0.5, 1]
    assert model.lora_target_modules == "all-linear"
    assert data.dataset_train_split == "train"
    assert os.environ["EBFT_TEST_VARIABLE"] == "1"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "stride: 4\nnum_generation: 4\n",
            r"recipe.yaml:2: .* num_generation; did you mean num_generations\?",
        ),
        ("config: other.yaml\n", r"recipe.yaml:1: unknown option config"),
        (
            "# a comment\nevaluation_strategy: steps\n",
            r"recipe.yaml:2: evaluation_strategy no .*`eval_strategy`",
        ),
        ("stride: four\n", r"recipe.yaml:1: .*stride: invalid int value: 'four'"),
        ("stride: 4.5\n", r"stride: invalid int value"),
        ("stride: true\n", r"stride: invalid int value"),
        ("stride:\n", r"recipe.yaml:1: stride is empty"),
        ("stride: [1, 2]\n", r"stride: got \[1, 2\]; this option takes one value"),
        ("stride: {a: 1}\n", r"stride: got \{'a': 1\}"),
        ("bf16: maybe\n", r"recipe.yaml:1: --bf16: .*maybe"),
        ("stride: 4\nstride: 5\n", r"recipe.yaml:2: stride is already set in line 1"),
        ("- stride\n", r"recipe.yaml: expected lines of the form `name: value`"),
        ("", r"recipe.yaml: expected lines"),
        ("stride: [\n", r"recipe.yaml: not valid YAML"),
        ("env: PATH\n", r"recipe.yaml:1: env: got 'PATH'"),
    ],
)
def test_wrong_yaml_names_file_line_and_remedy(write_yaml, recipe, message):
    with pytest.raises(ValueError, match=message):
        parse([*write_yaml(recipe), *REQUIRED])


def test_yaml_that_is_not_utf8(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"run_name: \xff\n")
    with pytest.raises(ValueError, match="recipe.yaml: not UTF-8"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "3"], "unknown option max_step; did you mean max_steps?"),
        (["--evaluation-strategy=steps"], "evaluation_strategy no longer exists; write `eval_strategy`"),
        (["--stride", "x"], "stride: invalid int value: 'x'"),
        (["--stride"], "stride: expected one argument"),
        (["--config"], "config: expected one argument"),
        (["stray"], "unexpected word 'stray'"),
        (["--num_processes", "0"], "num_processes: got 0"),
        (["--eval_split_size", "-1"], "eval_split_size: got -1.0"),
        (["--eval_split_size", "0.1", "--eval_dataset_name", "x"], "keep one of them"),
        (["--dtype", "int8"], "dtype: invalid choice: 'int8'"),
    ],
)
def test_wrong_flag_names_it_and_the_remedy(words, message):
    with pytest.raises(ValueError) as caught:
        parse([*REQUIRED, *words])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name"])
def test_required_option(name, capsys):
    at = REQUIRED.index(f"--{name}")
    assert main(["train", *REQUIRED[:at], *REQUIRED[at + 2 :]]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: missing")


def test_missing_yaml_file(capsys):
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere.yaml" in error
    assert error.count("\n") == 1


def test_dropped_keys_are_really_gone():
    known = vars(ArgumentParser().parse_known_args([])[0])
    assert not GONE.keys() & known.keys()
    with pytest.raises(ValueError, match="no longer exists"):
        read_flags(ArgumentParser(), ["--warmup_ratio", "0.1"])


def test_streamed_data_need_a_number_of_updates():
    with pytest.raises(ValueError, match="max_steps: missing"):
        parse([*REQUIRED, "--dataset_streaming"])
    assert parse([*REQUIRED, "--dataset_streaming", "--max_steps", "3"]).training.max_steps == 3


def test_output_dir_is_named_after_model_and_data(tmp_path):
    data = tmp_path / "qa.jsonl"
    data.touch()
    assert default_output_dir("Qwen/Qwen2.5-0.5B", str(data)) == "runs/Qwen2.5-0.5B-qa"
    assert default_output_dir(str(tmp_path) + "/", "openai/gsm8k") == f"runs/{tmp_path.name}-gsm8k"
    assert parse(REQUIRED).training.output_dir == "runs/model-data"
    assert parse([*REQUIRED, "--output_dir", "elsewhere"]).training.output_dir == "elsewhere"


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


def test_lora_and_evaluation_on_held_out_documents(checkpoint, workplace, capsys):
    words = ["--use_peft", "--eval_strategy", "steps", "--eval_steps", "1", "--eval_split_size", "2"]
    status = main(["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words])
    assert status == 0, capsys.readouterr().err
    assert Path("runs/tiny-my/adapter_model.safetensors").is_file()
    assert "eval_" in Path("runs/tiny-my/metrics.jsonl").read_text()


def test_resolved_config_repeats_the_run(checkpoint, workplace, capsys):
    words = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--model_revision", "v1"]
    words += ["--dataset_train_split", "train[:8]", "--feature_layers", "0.5", "4"]
    Path("split").mkdir()
    Path("my.jsonl").rename("split/my.jsonl")
    words += ["--dataset_name", "split"]
    assert main(["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words]) == 0
    resolved = yaml.safe_load(Path("runs/tiny-split/resolved_config.yaml").read_text())
    assert resolved["lora_r"] == 2
    assert "lora_alpha" not in resolved, "as by default"
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
        (["--dataset_name", "your.jsonl"], "your.jsonl"),
        (["--dataset_name", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "give eval_dataset_name, or hold out"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint: runs/tiny-my holds no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: no folder nowhere"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
        (["--use_peft", "--lora_target_modules", "nonsense"], "nonsense"),
        (["--num_generations", "1"], "num_generations"),
    ],
)
def test_unusable_input_is_one_error_and_no_traceback(checkpoint, workplace, capfd, words, message):
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert main(["train", "--config", "tiny.yaml", "--model_name_or_path", str(checkpoint), *words]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert message in error[error.index("error: ") :]
