"""pass@k and intervals against enumeration and known values."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.objectives import mean_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize(("n", "c", "k"), [(n, c, k) for n in (1, 2, 5) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_sample(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_pass_at_1_is_the_share_of_right_samples():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_impossible_counts_is_refused(n, c, k):
    with pytest.raises(ValueError, match="must be between"):
        pass_at_k(n, c, k)


def test_mean_interval_is_the_normal_interval():
    values = [0.0, 0.25, 0.5, 0.75, 0.75, 0.25]
    half = 1.959964 * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    assert mean_interval(values) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)


def test_mean_interval_covers_the_truth_at_its_confidence():
    generator = random.Random(0)
    hits = 0
    for _ in range(400):
        low, high = mean_interval([generator.random() for _ in range(40)])[1:]
        hits += low <= 0.5 <= high
    assert 0.91 <= hits / 400 <= 0.98


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_mean_interval_holds_its_mean_and_stays_in_the_unit_range(values):
    mean, low, high = mean_interval(values)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1


def test_problems_all_failed_or_all_solved_still_have_a_width():
    assert mean_interval([0.0] * 50) == wilson_interval(0, 50)
    assert mean_interval([1.0] * 50) == wilson_interval(50, 50)
    assert mean_interval([1.0] * 50).low < 1


def test_wilson_interval_equals_published_values():
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(counts):
    share, low, high = wilson_interval(*counts)
    assert 0 <= low <= share <= high <= 1


def test_wrong_counts_and_confidence_are_refused():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="at least one number"):
        mean_interval([])
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        wilson_interval(1, 2, confidence=95)
