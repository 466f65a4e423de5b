"""The `ebft` command: finds the verb, imports it alone, and turns a user's mistake into one line and exit status 2."""

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import ebft

# Verb -> what it does. Its module is `ebft.cli.<verb>` and has HELP (shown without importing torch) and run(argv).
VERBS = {
    "train": "fine-tune a model on your documents",
    "plan": "say what a run would cost, without weights or a GPU",
    "env": "show versions, devices, memory and attention backends",
}

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
        The exit status: 0, or 2 after a mistake of the user's.
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
    verb, *options = words
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0)[0]
        return _fail(f"unknown verb {verb!r}; did you mean {nearest!r}? `ebft --help` lists them all")

    module = import_module(f"ebft.cli.{verb}")
    if "-h" in options or "--help" in options:
        print(module.HELP)
        return 0
    try:
        module.run(options)
    except (ValueError, OSError) as error:
        if not is_users_mistake(error):
            raise
        if show_traceback:
            traceback.print_exc()
        return _fail(str(error))
    return 0


def is_users_mistake(error: ValueError | OSError) -> bool:
    """Tell a mistake in the user's input, which needs one line, from a failure, which needs its traceback.

    Until training starts every ValueError and OSError is about options, data or model, whichever library raises it.
    Once inside `Trainer.train`, only those raised by ebft itself are: any other is a bug, or a disk that is full.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    functions = [frame.f_code.co_name for frame in frames]
    training = ("transformers.trainer", "train") in zip(modules, functions, strict=True)
    return not training or modules[-1].split(".")[0] == "ebft"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
