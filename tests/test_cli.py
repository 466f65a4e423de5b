"""The command line: help without torch, mistakes as one line and exit status 2, YAML and flags as in TRL."""

import json
import os
import subprocess
import sys

import pytest

import ebft
from ebft.cli import VERBS, is_users_mistake, main
from ebft.cli.arguments import argument_parser, default_output_dir, parse
from ebft.cli.parser import GONE, read_flags

REQUIRED = ["--model_name_or_path", "some/model", "--dataset_name", "some/data"]


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
    def error_from(module: str, inside_training: bool, kind: str = "ValueError") -> Exception:
        """An error raised in a module of this name, with or without Trainer.train below it."""
        names = {"__name__": module}
        exec(f"def fail(): raise {kind}", names)
        names = {"__name__": "transformers.trainer", "fail": names["fail"]}
        exec("def train(): fail()\ndef __init__(): fail()", names)
        with pytest.raises(Exception, match="^$") as caught:
            names["train" if inside_training else "__init__"]()  # pyright: ignore[reportCallIssue]
        return caught.value

    assert is_users_mistake(error_from("transformers.modeling_utils", inside_training=False))
    assert is_users_mistake(error_from("ebft.data", inside_training=True))
    assert not is_users_mistake(error_from("torch.nn.functional", inside_training=True))
    assert is_users_mistake(error_from("torch", inside_training=False, kind="RuntimeError"))
    assert not is_users_mistake(error_from("ebft.trainer", inside_training=True, kind="RuntimeError"))
    assert is_users_mistake(error_from("transformers.trainer_optimizer", inside_training=True, kind="ImportError"))


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
        "feature_layers: [0.5, 1]\nuse_peft: true\nlora_target_modules: all-linear\nenv: {EBFT_TEST_VARIABLE: 1}\n"
    )
    data, training, model, *_ = parse([*write_yaml(recipe), *REQUIRED])
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
        ("stride: [\n", r"recipe.yaml:2: not valid YAML: "),
        ("env: PATH\n", r"recipe.yaml:1: env: write lines"),
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
        (["--wombats", "3"], "unknown option wombats; see `ebft train --help-all`"),
        (["--trust_remote_code", "true"], "write `model_init_kwargs: {trust_remote_code: true}`"),
        (["--lora_r", "8"], "lora_r: got 8 without LoRA, where it does nothing; add --use_peft true"),
        (["--config", "nosuch.yaml"], "config: cannot read nosuch.yaml"),
        (["--eval_split_size", "1.5"], "eval_split_size: got 1.5"),
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
    known = vars(argument_parser().parse_known_args([])[0])
    assert not GONE.keys() & known.keys()
    with pytest.raises(ValueError, match="no longer exists"):
        read_flags(argument_parser(), ["--warmup_ratio", "0.1"])


def test_evaluation_data_are_used():
    assert parse(REQUIRED).training.eval_strategy == "no"
    assert parse([*REQUIRED, "--eval_split_size", "0.1"]).training.eval_strategy == "epoch"
    words = ["--eval_dataset_name", "x", "--eval_strategy", "steps", "--eval_steps", "3"]
    assert parse([*REQUIRED, *words]).training.eval_strategy == "steps"


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
