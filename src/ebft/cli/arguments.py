"""The options of `ebft train` and `ebft plan`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from trl import ModelConfig

from ebft.cli.engines import engine_of
from ebft.cli.parser import ArgumentParser, read_flags
from ebft.compare.config import METHODS
from ebft.config import EBFTConfig
from ebft.credentials import check_no_credentials


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
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "How they share the run: ddp (the default), fsdp2, zero2, zero3, or a file of `accelerate config`."
        },
    )

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes: got {self.num_processes}; give at least 1")
        if self.accelerate_config is not None:
            engine_of(self.accelerate_config)
        size = self.eval_split_size
        if size is not None and (size <= 0 or (size >= 1 and size != int(size))):
            raise ValueError(
                f"eval_split_size: got {size}; give a share between 0 and 1 or a whole number of documents"
            )
        if size is not None and self.eval_dataset_name is not None:
            raise ValueError("eval_split_size, eval_dataset_name: both are given; keep one of them")


@dataclass
class MethodArguments:
    """How to train: EBFT, or what it is compared with, on the same documents."""

    method: str = field(
        default="ebft",
        metadata={"help": "ebft; sft (trl.SFTTrainer); rlvr (trl.RLOOTrainer, needs `reward`)."},
    )
    reward: str | None = field(
        default=None,
        metadata={"help": "Of rlvr: unit_tests (the column `tests`), bleu, or an import path: my_rewards.length."},
    )
    time_limit: float = field(default=10.0, metadata={"help": "Of reward unit_tests: seconds a program may run."})
    allow_weak_sandbox: bool = field(
        default=False, metadata={"help": "Of reward unit_tests: run code even where only resource limits protect."}
    )
    max_train_seconds: float | None = field(
        default=None, metadata={"help": "End the training after so many seconds of optimiser steps."}
    )
    save_seconds: float | None = field(
        default=None, metadata={"help": "Save a checkpoint after each so many seconds of optimiser steps."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End the training after so many evaluations in a row without a better metric_for_best_model "
            "(default: loss). The best weights are those saved at the end with load_best_model_at_end."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Better is what improves by more than this, for early_stopping_patience."}
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}; give one of {', '.join(METHODS)}")
        if self.method == "rlvr" and self.reward is None:
            raise ValueError("reward: missing; method rlvr needs unit_tests, bleu, or an import path of a function")
        default = {spec.name: spec.default for spec in fields(self)}
        for name, wanted in (
            ("reward", self.method == "rlvr"),
            ("time_limit", self.reward == "unit_tests"),
            ("allow_weak_sandbox", self.reward == "unit_tests"),
            ("early_stopping_threshold", self.early_stopping_patience is not None),
        ):
            if not wanted and getattr(self, name) != default[name]:
                needs = {"reward": "method: rlvr", "early_stopping_threshold": "early_stopping_patience"}
                needed = needs.get(name, "reward: unit_tests")
                raise ValueError(f"{name}: got {getattr(self, name)}, which does nothing without {needed}")
        for name in ("time_limit", "max_train_seconds", "save_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: got {value}; give seconds above 0")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience: got {self.early_stopping_patience}; give at least 1")
        if not 0 <= self.early_stopping_threshold < float("inf"):
            raise ValueError(f"early_stopping_threshold: got {self.early_stopping_threshold}; give at least 0")


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

    bandwidth: float | None = field(
        default=None,
        metadata={"help": "GB/s that each process can send while it receives as much, for the time of communication."},
    )

    def __post_init__(self) -> None:
        if self.bandwidth is not None and self.bandwidth <= 0:
            raise ValueError(f"bandwidth: got {self.bandwidth}; give GB/s between processes, such as 50")
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
    method: MethodArguments
    plan: PlanArguments | None = None


def argument_parser(verb: str = "train") -> ArgumentParser:
    """A parser of the options of `train` or `plan`."""
    groups = [DataArguments, EBFTConfig, ModelArguments, MethodArguments]
    groups += [PlanArguments] if verb == "plan" else []
    return ArgumentParser(verb, groups)


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
    parser = argument_parser(verb)
    namespace = read_flags(parser, argv)
    if verb == "plan" and namespace.method != "ebft":
        raise ValueError(f"method: got {namespace.method!r}; `ebft plan` knows what EBFT costs, no other method")
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
    for group in (arguments.data, arguments.model, arguments.method):
        check_no_credentials(vars(group))
    _check_completion_length(arguments)
    if arguments.method.early_stopping_patience is not None:
        _choose_best_metric(arguments.training)
    if not arguments.model.use_peft:
        _refuse_lora_options(arguments.model)
    return arguments


def _check_completion_length(arguments: Arguments) -> None:
    length = arguments.training.max_completion_length
    completes = arguments.method.method == "rlvr" or arguments.training.rollout == "completion"
    if not completes and length != EBFTConfig.max_completion_length:
        raise ValueError(
            f"max_completion_length: got {length}, which does nothing without method: rlvr or rollout: completion; "
            "EBFT's blocks have `completion_length`"
        )


def _choose_best_metric(training: EBFTConfig) -> None:
    """The metric of early stopping: the one given, else the loss."""
    if training.eval_strategy == "no":
        raise ValueError(
            "early_stopping_patience: nothing is evaluated; give eval_dataset_name, eval_split_size or eval_strategy"
        )
    if training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = "loss", False


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
