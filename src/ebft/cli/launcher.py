"""Runs torchrun or `accelerate launch`, and gives their processes' exit status where these would give a traceback."""

import logging
import runpy
import signal
import sys

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
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status not in (1, 2, 130):  # else the process itself has said why
            print(str(error), file=sys.stderr)
        return status if status > 0 else 128 - status
    except SignalException as received:
        return 130 if received.sigval == signal.SIGINT else 128 + received.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
