"""Means over seeds with their 95 % t-intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# 97.5 % points of Student's t with 1 to 10 degrees of freedom; above, an expansion about the normal one is as exact.
T_975 = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)
NORMAL_975 = 1.959964


class Estimate(NamedTuple):
    """A mean, the ends of its interval (None where one seed tells nothing of the spread), and the number of seeds."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def t_975(degrees: int) -> float:
    """The 97.5 % point of Student's t (Abramowitz and Stegun 26.7.5 above 10 degrees of freedom)."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = NORMAL_975
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval of one value per seed; values that are not finite make a mean that is not."""
    try:
        mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
        variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    except OverflowError:  # a run that came apart may log numbers whose sum or squares no float can hold
        mean, variance = math.nan, math.nan
    if len(values) < 2 or math.isnan(mean):
        return Estimate(mean, None, None, len(values))
    half = t_975(len(values) - 1) * math.sqrt(variance / len(values))
    return Estimate(mean, mean - half, mean + half, len(values))
