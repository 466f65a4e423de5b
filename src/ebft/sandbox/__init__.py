"""Runs code that nobody trusts, under limits, and says whether it passed its tests."""

from .program import Limits, Outcome, Program, Verdict, available_languages
from .runner import Sandbox

__all__ = ["Limits", "Outcome", "Program", "Sandbox", "Verdict", "available_languages"]
