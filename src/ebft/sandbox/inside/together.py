"""Candidate and tests in one process, for tests that cannot be told apart from the code they test."""

from . import wire
from .candidate_side import load
from .tests_side import FILENAME, failure

# Bound here, so that a candidate that replaces the built-in ones replaces them for itself.
compile_, exec_, eval_ = compile, exec, eval


def judge_together(read_fd: int, write_fd: int) -> None:
    """Run the code, only then ask for the tests and the nonce, run the tests and answer with the nonce."""
    tests = ""
    try:
        names = load(wire.text_of(wire.receive(read_fd)))
        wire.send(write_fd, b"R")
        tests, entry_point = wire.text_of(wire.receive(read_fd)), wire.text_of(wire.receive(read_fd))
        nonce = wire.receive(read_fd)
        if entry_point:
            names["candidate"] = eval_(entry_point, names)
        exec_(compile_(tests, FILENAME, "exec", dont_inherit=True), names)
        answer = b"P" + nonce
    except BaseException as error:  # noqa: BLE001 the verdict is on whatever code or tests raise, SystemExit too
        answer = wire.bytes_of(failure(error, tests))
    wire.send(write_fd, answer)
