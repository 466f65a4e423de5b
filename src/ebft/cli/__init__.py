"""The `ebft` command: finds the verb, imports it alone, and turns a user's mistake into one line and exit status 2."""

import difflib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

import ebft

# Verb -> what it does. Its module is `ebft.cli.<verb>` and has HELP (shown without importing torch) and run(argv).
VERBS = {
    "train": "fine-tune a model on your documents",
    "evaluate": "measure models side by side on held-out documents and tasks",
    "compare": "train and measure methods side by side, over seeds",
    "report": "show runs in one HTML file: curves, tables and their rollouts",
    "merge": "make one model of an adapter and its base",
    "plan": "say what a run would cost, without weights or a GPU",
    "convert": "turn settings of the authors' release or of Axolotl into ours",
    "env": "show versions, devices, memory and attention backends",
}

# Package -> the extra of ours that installs it.
EXTRAS = {
    "bitsandbytes": "quantization",
    "deepspeed": "deepspeed",
    "lm-eval": "lm-eval",
    "matplotlib": "plot",
    "plotly": "report",
    "sacrebleu": "translation",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}

PATIENCE = 10  # seconds
INTERRUPTED = 130  # exit status after Ctrl-C, as in shells: 128 + SIGINT

HELP = "\n".join(
    [
        "usage: ebft VERB [options]",
        "",
        "Energy-Based Fine-Tuning of language models.",
        "",
        *(f"  {verb:<10}{summary}" for verb, summary in VERBS.items()),
        "",
        "  ebft VERB --help   what the verb does, with examples",
        "  ebft --version     the version of this library",
        "  --traceback        after an error, show where it was raised (or set EBFT_TRACEBACK=1)",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `ebft`; None reads them from the command line.

    Returns:
        The exit status: 0, 2 after a mistake of the user's, or 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("EBFT_TRACEBACK", "0") not in ("", "0")
    if "--traceback" in words:
        words.remove("--traceback")
        # In the environment, so that the processes of a multi-process run see it as well.
        os.environ["EBFT_TRACEBACK"] = "1"
        show_traceback = True

    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        print(ebft.__version__)
        return 0
    # PEFT imports bitsandbytes where it is, which warns on some CPUs that it could not fetch code for them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    verb, *options = words
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1)
        question = f"did you mean {nearest[0]!r}? " if nearest else ""
        return _fail(f"unknown verb {verb!r}; {question}`ebft --help` lists them all")

    module = import_module(f"ebft.cli.{verb}")
    if "-h" in options or "--help" in options:
        print(module.HELP)
        return 0
    return _run(module.run, options, show_traceback)


def _run(run: Callable[[list[str]], None], options: list[str], show_traceback: bool) -> int:
    """Run a verb and turn what ends it into an exit status."""
    from safetensors import SafetensorError

    formatwarning, warnings.formatwarning = warnings.formatwarning, _one_line
    # Last in the list, so that it hides no library's own filter; the first process speaks for all of them.
    # Of transformers' own use of its own names.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("once" if _is_first_process() else "ignore", category=UserWarning, append=True)
    try:
        run(options)
    except (ValueError, OSError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        if not is_users_mistake(error):
            raise
        if show_traceback:
            traceback.print_exc()
        return _fail(_describe(error))
    except KeyboardInterrupt as interrupt:
        if _is_first_process():
            print(str(interrupt) or "stopped", file=sys.stderr)
        return INTERRUPTED
    finally:
        warnings.formatwarning = formatwarning
    return 0


def is_users_mistake(error: Exception) -> bool:
    """Tell a mistake in the user's input, which needs one line, from a failure, which needs its traceback.

    Until training starts every error is about options, data, model or what is installed, whichever library raises it.
    Once inside `Trainer.train`, only what is not installed is, and a ValueError or OSError raised by ebft itself: any
    other is a bug, or a disk that is full.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    functions = [frame.f_code.co_name for frame in frames]
    training = ("transformers.trainer", "train") in zip(modules, functions, strict=True)
    if not training or isinstance(error, ImportError):
        return True
    return isinstance(error, ValueError | OSError) and modules[-1].split(".")[0] == "ebft"


def _describe(error: Exception) -> str:
    """The error's message, with how to install what it lacks."""
    # A KeyError says its key and nothing else.
    message = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) or not str(error) else str(error)
    if isinstance(error, ImportError | RuntimeError) and "install" in message:
        needed = [extra for package, extra in EXTRAS.items() if package in message.lower()]
        message += f" (pip install 'ebft[{needed[0]}]')" if needed else ""
    if type(error).__name__ == "SafetensorError":
        message += " (a damaged .safetensors file of the model: copy or download it again)"
    return message


def _fail(message: str) -> int:
    if not _is_first_process():
        # The first process most likely says the same now, and then the launcher ends this one before it speaks.
        time.sleep(PATIENCE)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A Python warning without file, line and source, which are this library's own."""
    return f"warning: {' '.join(str(message).split())}\n"


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
