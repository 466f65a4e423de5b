"""The options of the verbs: flat YAML and flags into dataclasses, with a clear line for every wrong one."""

import argparse
import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from ebft.config import EBFTConfig

# Keys that older recipes name and transformers or TRL dropped -> what to write now.
GONE = {
    "adafactor": "write `optim: adafactor`",
    "dispatch_batches": "write `accelerator_config: {dispatch_batches: ...}`",
    "evaluation_strategy": "write `eval_strategy`",
    "fp16_backend": "remove it: there is one backend",
    "fp16_opt_level": "remove it: apex is not supported",
    "fsdp_min_num_params": "write `fsdp_config: {min_num_params: ...}`",
    "fsdp_transformer_layer_cls_to_wrap": "write `fsdp_config: {transformer_layer_cls_to_wrap: ...}`",
    "group_by_length": "remove it: documents come in random order, so that a resume is exact",
    "half_precision_backend": "remove it: there is one backend",
    "include_inputs_for_metrics": "write `include_for_metrics: [inputs]`",
    "include_tokens_per_second": "remove it: tokens_per_second is always logged",
    "jit_mode_eval": "remove it",
    "logging_dir": "remove it: metrics.jsonl is in output_dir (TensorBoard reads TENSORBOARD_LOGGING_DIR)",
    "max_completion_length": "write `completion_length`",
    "max_seq_length": "write `max_length`",
    "no_cuda": "write `use_cpu: true`",
    "overwrite_output_dir": "remove it: choose another output_dir, or go on with `resume_from_checkpoint: true`",
    "past_index": "remove it",
    "per_gpu_eval_batch_size": "write `per_device_eval_batch_size`",
    "per_gpu_train_batch_size": "write `per_device_train_batch_size`",
    "push_to_hub_model_id": "write `hub_model_id`",
    "push_to_hub_organization": "write `hub_model_id: organization/name`",
    "push_to_hub_token": "write `hub_token`",
    "save_safetensors": "remove it: weights are always saved as safetensors",
    "split_batches": "write `accelerator_config: {split_batches: ...}`",
    "torch_dtype": "write `dtype`",
    "torchdynamo": "write `torch_compile_backend`",
    "tpu_num_cores": "remove it",
    "trust_remote_code": "write `model_init_kwargs: {trust_remote_code: true}`",
    "use_ipex": "remove it",
    "use_legacy_prediction_loop": "remove it",
    "use_mps_device": "remove it: the device is found by itself",
    "warmup_ratio": "write `warmup_steps: 0.03`: below 1 it is a share of all steps",
}


@dataclass
class DataArguments:
    """Which documents to train and to evaluate on (TRL's names where TRL has one), and with how many processes."""

    dataset_name: str = field(
        default="", metadata={"help": "Training documents: a name on the Hub, a local file or a folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the training documents while training, not before."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation documents, if they are not a split of dataset_name; used once per epoch unless "
            "eval_strategy says when."
        },
    )
    eval_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Hold out so many training documents (below 1: this share of them) for evaluation, which is then "
            "done once per epoch unless eval_strategy says when."
        },
    )
    num_processes: int = field(
        default=1, metadata={"help": "More than 1 runs the command again under `accelerate launch`."}
    )

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes: got {self.num_processes}; give at least 1")
        size = self.eval_split_size
        if size is not None and (size <= 0 or (size >= 1 and size != int(size))):
            raise ValueError(
                f"eval_split_size: got {size}; give a share between 0 and 1 or a whole number of documents"
            )
        if size is not None and self.eval_dataset_name is not None:
            raise ValueError("eval_split_size, eval_dataset_name: both are given; keep one of them")


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model options, without LoRA dropout: it would make the update off-policy."""

    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout; anything but 0 is set to 0."})


@dataclass
class PlanArguments:
    """What only `ebft plan` takes."""

    json: bool = field(default=False, metadata={"help": "Print JSON, with bytes where the tables have GiB."})
    flops: float | None = field(
        default=None, metadata={"help": "Matrix rate of one device in FLOP/s (4e14, say), to estimate time with."}
    )

    calibrate: bool = field(
        default=False, metadata={"help": "Time the engine on this machine, on a few layers, to estimate time with."}
    )
    memory: float | None = field(
        default=None, metadata={"help": "Memory in GiB of the GPU to plan for, if it is not this machine's."}
    )

    def __post_init__(self) -> None:
        if self.flops is not None and self.flops <= 0:
            raise ValueError(f"flops: got {self.flops}; give the matrix rate of one device in FLOP/s, such as 4e14")
        if self.flops is not None and self.calibrate:
            raise ValueError("flops, calibrate: both are given; calibrate measures what flops assumes: keep one")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory: got {self.memory}; give the memory of one device in GiB, such as 80")


class Arguments(NamedTuple):
    """The parsed options of one run."""

    data: DataArguments
    training: EBFTConfig
    model: ModelArguments
    plan: PlanArguments | None = None


class ArgumentParser(TrlParser):
    """TrlParser that raises ValueError for a bad flag where argparse would print two hundred lines of usage."""

    def __init__(self, verb: str = "train", groups: list[Any] | None = None) -> None:
        if groups is None:
            groups = [DataArguments, EBFTConfig, ModelArguments, *([PlanArguments] if verb == "plan" else [])]
        super().__init__(groups, prog=f"ebft {verb}", allow_abbrev=False)
        self.add_argument("--config", help="YAML file with any of these options; flags override it")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as a ValueError."""
        raise ValueError(message.removeprefix("argument "))


def read_flags(parser: ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Check the names and types of all options, YAML and flags, without building any configuration.

    Args:
        parser: A fresh parser; the YAML file's values become its defaults.
        argv: The words after the verb.

    Returns:
        One value per option.

    Raises:
        ValueError: An unknown or dropped option, a value of the wrong type, or no YAML file.
    """
    config_file = parser.parse_known_args(argv)[0].config
    if config_file is not None:
        parser.set_defaults_with_config(**_read_yaml(parser, Path(config_file)))
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("--"):
            raise ValueError(f"unexpected word {word!r}; options are written `--name value`")
        raise ValueError(_unknown_option(word.removeprefix("--").replace("-", "_"), vars(namespace)))
    return namespace


def parse(argv: list[str], verb: str = "train") -> Arguments:
    """Parse the options of a run; see `read_flags` for what is checked first.

    Args:
        argv: The words after the verb.
        verb: `train`, or `plan`, which has options of its own and does without data.

    Returns:
        The data, training and model options, each validated by its own class.

    Raises:
        ValueError: An option is unknown, missing, or has a wrong value.
    """
    parser = ArgumentParser(verb)
    namespace = read_flags(parser, argv)
    if namespace.eval_strategy == "no" and (namespace.eval_dataset_name or namespace.eval_split_size):
        argv = [*argv, "--eval_strategy", "epoch"]
    for name in ("model_name_or_path", "dataset_name"):
        if not getattr(namespace, name) and (verb, name) != ("plan", "dataset_name"):
            raise ValueError(f"{name}: missing; give `--{name} ...` or set it in the YAML file")
    if namespace.dataset_streaming and namespace.max_steps <= 0:
        raise ValueError("max_steps: missing; a streamed dataset has no length that would give the number of updates")
    if namespace.output_dir is None:
        parser.set_defaults(output_dir=default_output_dir(namespace.model_name_or_path, namespace.dataset_name))
    *groups, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    arguments = Arguments(*groups)
    if not arguments.model.use_peft:
        _refuse_lora_options(arguments.model)
    return arguments


def _refuse_lora_options(model: ModelArguments) -> None:
    defaults = ModelArguments()
    for spec in fields(model):
        value = getattr(model, spec.name)
        if spec.name.startswith("lora_") and value != getattr(defaults, spec.name):
            raise ValueError(f"{spec.name}: got {value} without LoRA, where it does nothing; add --use_peft true")


def default_output_dir(model: str, dataset: str) -> str:
    """Name the output folder after model and data: `Qwen/Qwen2.5-0.5B` and `qa.jsonl` give runs/Qwen2.5-0.5B-qa."""
    if not dataset:
        return str(Path("runs") / Path(model).resolve().name)
    data_path = Path(dataset)
    data_name = data_path.resolve().stem if data_path.exists() else data_path.name
    return str(Path("runs") / f"{Path(model).resolve().name}-{data_name}")


def _read_yaml(parser: ArgumentParser, path: Path) -> dict[str, Any]:
    """Read a flat YAML file into option values of the right types; messages name the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
        root, values = yaml.compose(text), yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"config: cannot read {path} ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected lines of the form `name: value`")
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    known = vars(parser.parse_known_args([])[0]).keys() & hints.keys()
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        try:
            if name in lines:
                raise ValueError(f"{name} is already set in line {lines[name]}; keep one of them")
            lines[name] = line
            if name == "env":
                _set_environment(values.pop(name))
            elif name not in known:
                raise ValueError(_unknown_option(name, known))
            else:
                values[name] = _typed(parser, name, values[name], value_node.value, hints[name])
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
    return values


def _set_environment(variables: Any) -> None:
    """Set the environment variables that TRL's recipes keep under `env`."""
    if not isinstance(variables, dict):
        raise ValueError(f"env: got {variables!r}; write lines of the form `VARIABLE: value` under it")
    os.environ.update({name: str(value) for name, value in variables.items()})


def _typed(parser: ArgumentParser, name: str, value: Any, text: Any, hint: Any) -> Any:
    """Convert a YAML value as the same words on the command line would be.

    The words are the file's own `text`, not YAML's reading of it, which takes 1e-6 for text and `no` for false.
    """
    kinds = {getattr(part, "__origin__", part) for part in (hint, *get_args(hint))}
    if value is None:
        if NoneType not in kinds:
            raise ValueError(f"{name} is empty; give a value or remove the line")
        return None
    if isinstance(value, (bool, dict)) and type(value) in kinds:
        return value
    if isinstance(value, dict):
        raise ValueError(f"{name}: got {value}; this option takes no `name: value` lines")
    if isinstance(value, list):
        if list not in kinds:
            raise ValueError(f"{name}: got {value}; this option takes one value")
        if str in kinds:
            return value
        words = [f"--{name}", *map(str, value)]
    else:
        words = [f"--{name}={text}"]
    return getattr(parser.parse_known_args(words)[0], name)


def _unknown_option(name: str, known: Iterable[str]) -> str:
    if name in GONE:
        return f"{name} no longer exists; {GONE[name]}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown option {name}; " + (f"did you mean {nearest[0]}?" if nearest else "see `ebft train --help-all`")
