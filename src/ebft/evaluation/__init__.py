"""Evaluation of models: held-out documents, code against its tests, translations; every number with an interval.

`evaluate` does what `ebft evaluate` does; the measures can be used by themselves. The names are imported on first use:
the settings alone need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EvaluationConfig
    from .document_measures import document_means
    from .intervals import DocumentMean, Estimate
    from .pass_at_k import pass_at_k
    from .run import evaluate
    from .settings import DocumentSettings

__all__ = [
    "DocumentMean",
    "DocumentSettings",
    "Estimate",
    "EvaluationConfig",
    "document_means",
    "evaluate",
    "pass_at_k",
]

# Public name -> the module that holds it.
_HOMES = {
    "DocumentMean": "intervals",
    "DocumentSettings": "settings",
    "Estimate": "intervals",
    "EvaluationConfig": "config",
    "document_means": "document_measures",
    "evaluate": "run",
    "pass_at_k": "pass_at_k",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562) and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
