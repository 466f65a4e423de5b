"""Evaluation of models: held-out documents, code against its tests, translations; every number with an interval.

`evaluate` does what `ebft evaluate` does; the measures can be used by themselves.
"""

from .config import EvaluationConfig
from .document_measures import DocumentSettings, document_means
from .intervals import DocumentMean, Estimate
from .pass_at_k import pass_at_k
from .run import evaluate

__all__ = [
    "DocumentMean",
    "DocumentSettings",
    "Estimate",
    "EvaluationConfig",
    "document_means",
    "evaluate",
    "pass_at_k",
]
