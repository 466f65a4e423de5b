"""Runs torchrun or `accelerate launch`, and gives their processes' exit status where these would give a traceback."""

import logging
import os
import runpy
import signal
import sys

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(module: str, *words: str) -> int:
    """Run a launcher.

    Args:
        module: The launcher's module.
        *words: Its command line.

    Returns:
        The exit status: that of the process that failed first, or 130 after Ctrl-C.
    """
    # It reports what is said below once more, and every signal that it sends.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    sys.argv = [module, *words]
    # Left to torch, a SIGTERM would leave the processes 30 s to save, and SIGUSR1 would end the launcher alone.
    for variable in ("TORCHELASTIC_SIGNALS_TO_HANDLE", "PET_SIGNALS_TO_HANDLE"):  # newer torchruns take the second
        os.environ.setdefault(variable, "SIGINT,SIGHUP,SIGQUIT")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        status = status if status > 0 else 128 - status
        if status not in (1, 2, 130, 138, 143):  # else the process itself has said why, or was told to stop
            print(str(error), file=sys.stderr)
        return status
    except SignalException as received:
        return 130 if received.sigval == signal.SIGINT else 128 + received.sigval
    return 0


def _pass_on(number: int, frame: object) -> None:
    """Give a signal to the processes that train, and go on waiting for them."""
    for child in psutil.Process().children():
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
