"""Parses the words of a verb that has few options of its own; a mistake is one line."""

import argparse
from typing import NoReturn


class WordParser(argparse.ArgumentParser):
    """Raises a ValueError where argparse would print its usage and leave.

    Args:
        verb: Of `ebft`.
    """

    def __init__(self, verb: str):
        super().__init__(f"ebft {verb}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")
