"""The HTML report of one or several runs: reads their folders, imports neither torch nor transformers."""

from .report import write_report

__all__ = ["write_report"]
