"""Estimates from samples: pass@k, confidence intervals of means and shares, and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

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


def paired_bootstrap(
    differences: Sequence[float], *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean of paired differences, one per seed of an experiment, with its percentile bootstrap interval (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Few seeds make it too narrow: n of them have at most nⁿ resamples, and no mean lies beyond the smallest and the
    largest difference. Of intervals of normal differences around 0, 17 % exclude 0 with five of them, 25 % with three,
    10 % with ten; :func:`sign_flip_p` is exact. A single difference says nothing about the spread between seeds:
    (-inf, inf).
    """
    values = _finite_array(differences)
    tail = (1 - _valid(confidence)) / 2
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), (tail, 1 - tail))
    # Equal differences have means that differ in their last bits; the mean must not lie outside.
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of paired differences: the share of all 2ⁿ choices of their signs whose mean is as far
    from 0 as theirs (Fisher's randomisation test). At least 2^(1-n): five seeds cannot give less than 0.0625.
    """
    values = _finite_array(differences)
    # Sums in another order differ in their last bits; a tie must count as one.
    reach = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if reach <= 0:
        return 1.0
    half = len(values) // 2
    left, right = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    below = np.searchsorted(right, -reach - left, side="right").sum()
    above = left.size * right.size - np.searchsorted(right, reach - left, side="left").sum()
    return float(below + above) / (left.size * right.size)


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """The sums of the values with every choice of signs, ``[2 ** len(values)]``."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def _finite_array(differences: Sequence[float]) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"differences must be at least one finite number, got {list(differences)[:8]}")
    return values


def _normal_quantile(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + _valid(confidence)) / 2)


def _valid(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence
