"""A pickle that does something, for what must not load it."""

import os
from pathlib import Path


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)
