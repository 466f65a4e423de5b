"""Evaluation of models on held-out documents: cross-entropy, feature-matching curves, and their intervals."""

from .cross_entropy import cross_entropy
from .feature_curve import FeatureCurve, feature_matching_curve
from .intervals import DocumentMean, Estimate

__all__ = ["DocumentMean", "Estimate", "FeatureCurve", "cross_entropy", "feature_matching_curve"]
