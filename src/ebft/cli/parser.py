"""Flat YAML and flags into dataclasses, with a clear line for every wrong one; what all verbs share."""

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from trl import TrlParser

from ebft.credentials import hidden, place_of

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


class ArgumentParser(TrlParser):
    """TrlParser that raises ValueError for a bad flag where argparse would print two hundred lines of usage."""

    def __init__(self, verb: str, groups: Sequence[Any]) -> None:
        super().__init__(list(groups), prog=f"ebft {verb}", allow_abbrev=False)
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
        raise ValueError(_unknown_option(parser, word.removeprefix("--").replace("-", "_"), vars(namespace)))
    return namespace


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
        raise ValueError(f"{path}{place_of(error)}") from error
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
                raise ValueError(_unknown_option(parser, name, known))
            else:
                values[name] = _typed(parser, name, values[name], value_node.value, hints[name])
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
    return values


def _set_environment(variables: Any) -> None:
    """Set the environment variables that TRL's recipes keep under `env`."""
    if not isinstance(variables, dict):
        raise ValueError("env: write lines of the form `VARIABLE: value` under it")
    os.environ.update({name: str(value) for name, value in variables.items()})


def _typed(parser: ArgumentParser, name: str, value: Any, text: Any, hint: Any) -> Any:
    """Convert a YAML value as the same words on the command line would be.

    The words are the file's own `text`, not YAML's reading of it, which takes 1e-6 for text and `no` for false.
    """
    shown = hidden({name: value})[name]
    kinds = {getattr(part, "__origin__", part) for part in (hint, *get_args(hint))}
    if value is None:
        if NoneType not in kinds:
            raise ValueError(f"{name} is empty; give a value or remove the line")
        return None
    if isinstance(value, (bool, dict)) and type(value) in kinds:
        return value
    if isinstance(value, dict):
        raise ValueError(f"{name}: got {shown}; this option takes no `name: value` lines")
    if isinstance(value, list):
        if list not in kinds:
            raise ValueError(f"{name}: got {shown}; this option takes one value")
        if str in kinds:
            return value
        words = [f"--{name}", *map(str, value)]
    else:
        words = [f"--{name}={text}"]
    return getattr(parser.parse_known_args(words)[0], name)


def _unknown_option(parser: ArgumentParser, name: str, known: Iterable[str]) -> str:
    if name in GONE:
        return f"{name} no longer exists; {GONE[name]}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"see `{parser.prog} --help-all`"
    return f"unknown option {name}; {remedy}"
