"""pass@k, intervals and p-values against enumeration and known values."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.objectives import mean_interval, pass_at_k, wilson_interval
from nemo_rmt.objectives.statistics import paired_bootstrap, sign_flip_p


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


def exact_bootstrap_means(differences):
    """The mean of every one of the n ** n resamples."""
    return sorted(statistics.fmean(draw) for draw in itertools.product(differences, repeat=len(differences)))


def test_the_paired_bootstrap_agrees_with_every_resample_there_is():
    differences = [0.03, -0.01, 0.08, 0.05, 0.02]
    means = exact_bootstrap_means(differences)
    mean, low, high = paired_bootstrap(differences, resamples=200_000)
    assert mean == pytest.approx(0.034)
    assert low == pytest.approx(means[round(0.025 * len(means))], abs=1e-3)
    assert high == pytest.approx(means[round(0.975 * len(means))], abs=1e-3)


def test_the_paired_bootstrap_agrees_with_the_normal_interval_of_many_differences():
    generator = random.Random(1)
    differences = [generator.gauss(0.1, 1) for _ in range(400)]
    half = 1.959964 * statistics.stdev(differences) / 20
    mean, low, high = paired_bootstrap(differences)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_a_wider_confidence_gives_a_wider_interval():
    differences = [0.1, 0.4, -0.2, 0.3, 0.0, 0.2]
    wide, narrow = paired_bootstrap(differences, confidence=0.99), paired_bootstrap(differences, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_paired_bootstrap_is_deterministic_and_its_seed_counts():
    differences = [0.1, 0.4, -0.2, 0.3, 0.05, 0.17, 0.26]
    assert paired_bootstrap(differences) == paired_bootstrap(differences)
    assert paired_bootstrap(differences) != paired_bootstrap(differences, seed=1)


def test_one_difference_says_nothing_about_the_spread():
    assert paired_bootstrap([0.3]) == (0.3, -math.inf, math.inf)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_the_bootstrap_interval_holds_the_mean_and_stays_within_the_differences(differences):
    mean, low, high = paired_bootstrap(differences, resamples=200)
    slack = 1e-9 * max(map(abs, differences))
    assert min(differences) - slack <= low <= mean <= high <= max(differences) + slack


def test_how_often_the_bootstrap_of_five_seeds_finds_what_is_not_there():
    generator = random.Random(0)
    found = 0
    for _ in range(1000):
        _, low, high = paired_bootstrap([generator.gauss(0, 1) for _ in range(5)], resamples=1000)
        found += not low <= 0 <= high
    assert 0.12 <= found / 1000 <= 0.22


@pytest.mark.parametrize(
    "differences",
    [
        [0.3],
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [0.1, -0.2, 0.3, 0.05],
        [1.0, 1.0, -1.0],
        [0.2, -0.2],
        [0.0, 0.0, 0.1],
        [0.1] * 7,
    ],
)
def test_the_sign_flip_p_value_is_the_share_of_sign_choices_as_far_out(differences):
    def total(signs):
        return abs(sum(Fraction(str(value)) * sign for value, sign in zip(differences, signs, strict=True)))

    observed = total([1] * len(differences))
    choices = list(itertools.product((-1, 1), repeat=len(differences)))
    assert sign_flip_p(differences) == sum(total(signs) >= observed for signs in choices) / len(choices)


def test_five_seeds_cannot_give_a_lower_p_value_than_a_sixteenth():
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 1 / 16


def test_the_sign_flip_p_value_of_many_seeds_is_exact_too():
    assert sign_flip_p([1.0] * 30) == 2 / 2**30


def test_no_effect_at_all_has_a_p_value_of_one():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0 and sign_flip_p([0.3, -0.3]) == 1.0


@pytest.mark.parametrize("differences", [[], [0.1, math.nan], [math.inf]])
def test_differences_that_are_none_or_not_finite_are_refused(differences):
    for function in (paired_bootstrap, sign_flip_p):
        with pytest.raises(ValueError, match="differences must be at least one finite number"):
            function(differences)
