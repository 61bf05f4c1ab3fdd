"""Estimates from samples: pass@k and confidence intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """An estimate in [0, 1] and its confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased probability that at least one of k samples is right: 1 − C(n−c, k) / C(n, k) (arXiv 2107.03374).

    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be between 0 and num_samples={num_samples}, got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and num_samples={num_samples}, got {k}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of per-problem values in [0, 1] with a normal interval over problems, clipped to [0, 1].

    One value per problem (its mean over samples): samples of one problem are not independent draws. Where every
    value is 0, or every value is 1, the normal interval has no width; Wilson's is given instead. A single value
    says nothing about the spread between problems: [0, 1].
    """
    values = [float(value) for value in values]
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"values must be at least one number in [0, 1], got {values[:8]}")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, 0.0, 1.0)
    if all(value == values[0] for value in values) and values[0] in (0.0, 1.0):
        return wilson_interval(round(mean) * len(values), len(values), confidence)
    half = _normal_quantile(confidence) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Share of successes in n independent trials with Wilson's score interval, which also holds near 0 and 1."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n, and n at least 1, got {successes} of {n}")
    z, share = _normal_quantile(confidence), successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the interval reaches 0 or 1 exactly; rounding must not leave the share outside it.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def _normal_quantile(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
