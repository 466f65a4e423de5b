"""`ebft train`: options and data in, a trained model with its metrics and rollouts out."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

    from ebft.cli.arguments import Arguments, DataArguments, MethodArguments
    from ebft.config import EBFTConfig

LAUNCHED = "EBFT_LAUNCHED"  # set in the processes of a launcher, which must not start another one

HELP = """\
usage: ebft train --model_name_or_path MODEL --dataset_name DATA [--option value ...]
       ebft train --config FILE.yaml [--option value ...]

Fine-tunes a causal language model. MODEL is a name on the Hugging Face Hub or a folder; DATA is a name on the Hub, a
local JSONL, Parquet, CSV or text file, or a folder of them, with a column `text`, `messages`, `prompt` and
`completion`, or `input_ids`; a .txt file is one document. The model, metrics.jsonl, rollouts/ and
resolved_config.yaml are written to --output_dir (default: runs/MODEL-DATA). A YAML file holds the same options as
flat `name: value` lines; flags override it.

examples:
  ebft train --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my.jsonl
  ebft train --config recipe.yaml --learning_rate 2e-6
  ebft train --config recipe.yaml --use_peft --lora_r 16 --learning_rate 1e-5
  ebft train --config recipe.yaml --resume_from_checkpoint last      # or auto: from the start if there is none
  ebft train --config recipe.yaml --num_processes 8 --accelerate_config fsdp2

often used, with their defaults:
  --output_dir DIR                   where everything of this run goes
  --learning_rate 1e-6               (1e-5 with --use_peft)
  --num_train_epochs 3               --max_steps N takes its place
  --per_device_train_batch_size 4    documents (not completions) per micro-batch
  --gradient_accumulation_steps 4    micro-batches per update
  --save_steps 500                   updates between checkpoints, from which --resume_from_checkpoint last goes on
  --max_length 1024                  tokens per document; longer text is split
  --stride 8  --context_length 8  --completion_length 8  --num_generations 4
  --rl_coef 1  --ce_coef 0.03        weights of feature matching and cross-entropy
  --kernel linear                    which statistic is matched: also rbf, energy, characteristic, ngram
  --eval_strategy no                 `steps` (with --eval_steps N) and `epoch` evaluate on the test split, or on
                                     --eval_dataset_name DATA or --eval_split_size 0.05; with these, default: epoch
  --num_processes 1                  more run under `accelerate launch`
  --accelerate_config ddp            how they share the run: also fsdp2, zero2, or a file of `accelerate config`
  --method ebft                      sft and rlvr are what EBFT is compared with, on the same documents, by TRL's
                                     trainers; rlvr needs --reward unit_tests, bleu, or MODULE.FUNCTION
  --max_train_seconds S              end the training after S seconds of updates
  --early_stopping_patience N        end it after N evaluations without a better --metric_for_best_model (eval_loss);
                                     --load_best_model_at_end saves the best weights at the end

  ebft train --help-all              every option
"""


def run(argv: list[str]) -> None:
    """Train; see HELP.

    Args:
        argv: The words after `ebft train`.

    Raises:
        ValueError: An option, the data or the model cannot be used; the message says which, and what to do.
        OSError: A file or a model cannot be read.
    """
    from ebft import pickles
    from ebft._compat import close_progress_bars
    from ebft.cli.arguments import argument_parser, parse
    from ebft.cli.engines import DDP, check_runs_ebft, engine_of
    from ebft.preemption import Stopped

    if "--help-all" in argv:
        argument_parser().print_help()
        return
    environment = dict(os.environ)
    arguments = parse(argv)
    # EBFT's own trainer reads the checkpoint's files itself, when training starts.
    checkpoint = find_checkpoint(arguments.training, contents=arguments.method.method != "ebft")
    shared = arguments.data.num_processes > 1 or engine_of(arguments.data.accelerate_config) != DDP
    shared |= bool(arguments.training.deepspeed)  # which wants a launcher's variables for one process, too
    if shared and not {"LOCAL_RANK", LAUNCHED} & environment.keys():
        if arguments.method.method == "ebft":
            check_runs_ebft(arguments.data.accelerate_config)
        _check_inputs(arguments)
        _launch(arguments, argv, environment)
    trainer = None
    try:
        trainer = build_trainer(arguments)
        with pickles.resuming(checkpoint):  # TRL's trainers do not see to it by themselves
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if trainer.is_world_process_zero():
            print(f"Model, metrics and rollouts are in {arguments.training.output_dir}")
        if arguments.training.push_to_hub:
            trainer.push_to_hub(dataset_name=arguments.data.dataset_name)
        _leave_together(trainer)
    except Stopped:
        close_progress_bars()
        _leave_together(trainer)
        raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher passes the terminal's Ctrl-C on, as a second one
        close_progress_bars()  # else they are drawn once more, behind the last word
        raise KeyboardInterrupt(_how_to_continue(arguments.training)) from None


def _leave_together(trainer: Trainer | None) -> None:
    """A process that leaves while another is still in the group takes that one down."""
    if trainer is not None and trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


def _how_to_continue(training: EBFTConfig) -> str:
    from ebft.checkpoints import last_complete_checkpoint

    if last_complete_checkpoint(str(training.output_dir)) is None:
        return f"stopped before the first checkpoint (save_steps={training.save_steps})"
    return "stopped; continue with --resume_from_checkpoint last"


def build_trainer(arguments: Arguments) -> Trainer:
    """Load the data and the model and put the trainer together.

    Args:
        arguments: The parsed options.

    Returns:
        A trainer ready for `train()`.
    """
    from trl import get_peft_config, get_quantization_config

    from ebft.callbacks import EarlyStopping, TrainingClock

    training, model, method = arguments.training, arguments.model, arguments.method
    # resolved_config.yaml repeats the options as they were given, so that a flag can still override each of them.
    description = {**describe(arguments), "model_init_kwargs": training.model_init_kwargs}
    training.model_init_kwargs = from_pretrained_options(arguments)
    evaluate = training.eval_strategy != "no"
    train_dataset, eval_dataset = load_datasets(arguments.data, evaluate=evaluate, seed=training.seed)
    options: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    adapter: Any = get_peft_config(model)
    if adapter is not None:
        adapter.revision = training.model_init_kwargs.get("revision")  # TRL's trainers do not say of which base it is
    options |= {"quantization_config": get_quantization_config(model), "peft_config": adapter}
    trainer = _trainer_of(method, description, str(model.model_name_or_path), training, options)
    if method.max_train_seconds is not None or method.save_seconds is not None:
        trainer.add_callback(TrainingClock(method.max_train_seconds, method.save_seconds))
    if method.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(method.early_stopping_patience, method.early_stopping_threshold))
    return trainer


def _trainer_of(
    method: MethodArguments, description: dict[str, Any], model: str, training: EBFTConfig, options: dict[str, Any]
) -> Trainer:
    """The trainer of a method; `options` are what all of them take."""
    if method.method == "ebft":
        from ebft.trainer import EBFTTrainer

        trainer = EBFTTrainer(model, training, **options)
        trainer.run_description, trainer.args.model_init_kwargs = description, description["model_init_kwargs"]
        return trainer
    from ebft.baselines import rlvr_trainer, sft_trainer
    from ebft.baselines.rewards import make_reward

    if method.method == "sft":
        return sft_trainer(model, training, **options, description=description)
    reward = make_reward(
        str(method.reward), time_limit=method.time_limit, allow_weak_sandbox=method.allow_weak_sandbox
    )
    length = training.max_completion_length
    return rlvr_trainer(
        model, training, **options, description=description, reward=reward, max_completion_length=length
    )


def from_pretrained_options(arguments: Arguments) -> dict[str, Any]:
    """TRL's model options that are arguments of from_pretrained; model_init_kwargs has the last word."""
    extra, model = arguments.training.model_init_kwargs or {}, arguments.model
    if isinstance(extra, str):
        raise ValueError("model_init_kwargs: no mapping; write `{name: value}`")
    options = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    return {name: value for name, value in options.items() if value is not None} | extra


def describe(arguments: Arguments) -> dict[str, Any]:
    """The data and model options that differ from their defaults, and all of an adapter, for resolved_config.yaml."""
    adapter = ("use_", "lora_") if arguments.model.use_peft else ()
    groups = (arguments.method, arguments.model, arguments.data)
    values = {
        spec.name: (getattr(group, spec.name), spec.default) for group in groups for spec in dataclasses.fields(group)
    }
    shown = {name: value for name, (value, default) in values.items() if value != default or name.startswith(adapter)}
    return {name: value for name, value in shown.items() if value is not None}


def load_datasets(data: DataArguments, evaluate: bool, seed: int):
    """Load the training documents and, where evaluation is asked for, the evaluation documents.

    Args:
        data: Which documents.
        evaluate: Whether evaluation documents are needed.
        seed: Of the choice of documents held out by `eval_split_size`.

    Returns:
        The training dataset, and the evaluation dataset or None.
    """
    from datasets import IterableDataset

    from ebft.data import load_documents

    train = load_documents(
        data.dataset_name,
        split=data.dataset_train_split,
        config=data.dataset_config,
        streaming=data.dataset_streaming,
    )
    if data.eval_split_size is not None:
        if isinstance(train, IterableDataset):
            raise ValueError("eval_split_size: a streamed dataset cannot be split; give eval_dataset_name instead")
        size = data.eval_split_size if data.eval_split_size < 1 else int(data.eval_split_size)
        parts = train.train_test_split(test_size=size, seed=seed)
        return parts["train"], parts["test"] if evaluate else None
    if not evaluate:
        return train, None
    if data.eval_dataset_name is not None:
        # A single file has only the split `train`.
        split = "train" if Path(data.eval_dataset_name).is_file() else data.dataset_test_split
        return train, load_documents(data.eval_dataset_name, split=split, field="eval_dataset_name")
    if Path(data.dataset_name).is_file():
        raise ValueError(
            f"eval_strategy: nothing to evaluate on, {data.dataset_name} is one file; give eval_dataset_name, or hold "
            "out a part of it with `eval_split_size: 0.05`"
        )
    return train, load_documents(data.dataset_name, split=data.dataset_test_split, config=data.dataset_config)


def find_checkpoint(training: EBFTConfig, contents: bool = True, writes: bool = True) -> str | None:
    """Find the checkpoint that `resume_from_checkpoint` means, before anything is loaded.

    A folder; `last` (also `true`) for the newest whole one; `auto` for that one or, if there is none, a new run.

    Args:
        training: The parsed settings.
        contents: Compare its files with their checksums, and not their sizes alone.
        writes: A run is about to begin; a plan leaves the output folder alone.

    Returns:
        Its folder, or None for a new run.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged; the output folder cannot be written to, another run
            is at work there, or a new run would mix with one in it.
    """
    from ebft.artifacts import LOCK, check_output_dir
    from ebft.locks import lock

    wanted, output_dir = str(training.resume_from_checkpoint), Path(str(training.output_dir))
    check_output_dir(output_dir, resuming=True)
    writes &= os.environ.get("RANK", "0") == "0"
    with ExitStack() as held:
        if writes:
            held.callback(lock(output_dir, LOCK, "ebft train").release)  # no other run begins while we look
        return _found_checkpoint(wanted, output_dir, contents, writes)


def _found_checkpoint(wanted: str, output_dir: Path, contents: bool, writes: bool) -> str | None:
    from ebft.artifacts import check_output_dir, check_resume, forget_start
    from ebft.checkpoints import check_whole, last_complete_checkpoint

    if wanted.lower() in ("none", "false"):
        check_output_dir(output_dir, resuming=False)
        return None
    last = last_complete_checkpoint(output_dir)
    if wanted.lower() == "auto" and last is None:
        if writes:
            forget_start(output_dir)
        return None
    if wanted.lower() in ("last", "true", "auto"):
        if last is None:
            raise ValueError(
                f"resume_from_checkpoint: {output_dir} holds no checkpoint; remove the option to start anew, or give "
                "`auto`"
            )
        found = last
    else:
        found = wanted
        if not Path(found).is_dir():
            raise ValueError(f"resume_from_checkpoint: no folder {found}; give a checkpoint's folder or `last`")
    check_whole(Path(found), contents)
    check_resume(output_dir, found)
    return found


def _check_inputs(arguments: Arguments) -> None:
    """Find mistakes that cost little to find before several processes report each of them."""
    from transformers import AutoConfig

    data, training, model = arguments[:3]
    options = {"trust_remote_code": False} | from_pretrained_options(arguments)
    AutoConfig.from_pretrained(str(model.model_name_or_path), **options)
    load_datasets(data, evaluate=training.eval_strategy != "no", seed=training.seed)


def _launch(arguments: Arguments, argv: list[str], environment: dict[str, str]) -> None:
    """Replace this process by a launcher that runs the same command `num_processes` times.

    Args:
        arguments: The parsed options.
        argv: The words they were parsed from.
        environment: The variables before parsing, which sets some for one process.

    Raises:
        ValueError: On CPUs, anything but DDP is asked for.
    """
    import torch

    from ebft.cli.engines import DDP, config_path, engine_of

    count, config = str(arguments.data.num_processes), arguments.data.accelerate_config
    use_cpu = arguments.training.use_cpu
    # On CPUs `accelerate launch` starts several processes through MPI only; torchrun needs nothing but torch.
    if torch.accelerator.is_available() and not use_cpu:
        chosen = ["--config_file", str(config_path(config))] if config else []
        launcher = ["accelerate.commands.launch", *chosen, "--num_processes", count]
    else:
        if engine_of(config) != DDP:
            raise ValueError(
                f"accelerate_config: got {config!r}; on CPUs accelerate gives DDP alone: leave it out, or give a file "
                "of DeepSpeed's settings as deepspeed"
            )
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
        # Without a GPU, accelerate joins the processes only where it is told to use CPUs.
        argv = argv if use_cpu else [*argv, "--use_cpu", "true"]
    command = [sys.executable, "-m", "ebft.cli.launcher", *launcher, "-m", "ebft.cli", "train", *argv]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment | {LAUNCHED: "1"})
