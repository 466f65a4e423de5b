"""Prints the tables of docs/migration.md."""

from . import authors, axolotl
from .rules import markdown

if __name__ == "__main__":
    for module in (authors, axolotl):
        print(f"{markdown(module.TABLE)}\n")
