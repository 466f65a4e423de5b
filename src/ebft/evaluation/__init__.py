"""Evaluation of models: held-out documents, code against its tests, translations; every number with an interval.

`evaluate` does what `ebft evaluate` does; the measures can be used by themselves.
"""

from .config import EvaluationConfig
from .cross_entropy import cross_entropy
from .feature_curve import FeatureCurve, feature_matching_curve
from .intervals import DocumentMean, Estimate
from .pass_at_k import pass_at_k
from .run import evaluate

__all__ = [
    "DocumentMean",
    "Estimate",
    "EvaluationConfig",
    "FeatureCurve",
    "cross_entropy",
    "evaluate",
    "feature_matching_curve",
    "pass_at_k",
]
