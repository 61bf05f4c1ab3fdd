"""Differences of estimates, and the verdict on what RL did."""

from __future__ import annotations

import random

import pytest

from nemo_rmt.report.estimates import Estimate, Skill, difference, judge


def share(value, half=0.03):
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def skill(pass_at_1, greedy, pass_at_4=None):
    some = None if pass_at_4 is None else share(pass_at_4)
    return Skill(share(pass_at_1), None if greedy is None else share(greedy, 0.02), some, 4)


WEAK, STRONG = skill(0.45, 0.99, 0.9), skill(0.97, 0.99, 0.99)
LONG_BEFORE, LONG_SAME, LONG_SOLVED = skill(0.08, 0.09, 0.3), skill(0.10, 0.10, 0.2), skill(0.70, 0.80, 0.9)


def test_sampling_that_catches_up_with_greedy_decoding_is_sharpening():
    assert judge(WEAK, STRONG, LONG_BEFORE, LONG_SAME) == "sharpening"
    assert judge(WEAK, STRONG, None, None) == "sharpening"


def test_longer_problems_solved_beyond_greedy_and_sampling_before_are_new_skill():
    assert judge(WEAK, STRONG, LONG_BEFORE, LONG_SOLVED) == "new skill"


def test_trained_lengths_solved_beyond_greedy_and_sampling_before_are_new_skill():
    assert judge(skill(0.1, 0.12, 0.3), skill(0.9, 0.92, 0.95), None, None) == "new skill"


def test_longer_problems_that_only_catch_up_with_greedy_are_sharpening():
    assert judge(WEAK, STRONG, skill(0.3, 0.6, 0.7), skill(0.6, 0.6, 0.7)) == "sharpening"


def test_a_gain_within_reach_of_sampling_before_is_undecided():
    assert judge(skill(0.4, 0.5, 0.95), skill(0.8, 0.85, 0.97), None, None) == "undecided"


@pytest.mark.parametrize("before", [skill(0.4, None, 0.5), skill(0.4, 0.5, None)])
def test_without_greedy_or_several_samples_nothing_is_claimed(before):
    assert judge(before, skill(0.9, 0.9), None, None) == "undecided"


def test_a_rise_within_the_intervals_is_no_change_and_a_fall_is_worse():
    assert judge(skill(0.45, 0.99), skill(0.47, 0.99), LONG_BEFORE, LONG_SAME) == "no change"
    assert judge(skill(0.45, 0.99), skill(0.30, 0.99), LONG_BEFORE, LONG_SOLVED) == "worse"


def test_without_intervals_no_rise_is_claimed():
    before, after = (Skill(Estimate(value), Estimate(value)) for value in (0.1, 0.9))
    assert judge(before, after, None, None) == "no change"


def test_difference_covers_the_truth_about_as_often_as_it_says():
    generator, hits = random.Random(0), 0

    def measured(truth, n=200):
        mean = sum(generator.random() < truth for _ in range(n)) / n
        half = 1.96 * (mean * (1 - mean) / n) ** 0.5
        return Estimate(mean, mean - half, mean + half)

    for _ in range(400):
        change = difference(measured(0.4), measured(0.55))
        hits += change.low <= 0.15 <= change.high
    assert 0.91 <= hits / 400 <= 0.98


def test_difference_of_equal_widths_is_the_root_of_the_sum_of_squares():
    change = difference(share(0.4, 0.03), share(0.6, 0.04))
    assert (change.value, change.low, change.high) == pytest.approx((0.2, 0.15, 0.25))


def test_skill_is_read_with_its_prefix_interval_and_largest_k():
    metrics = {
        "sft/tasks/chains/pass@1": 0.5,
        "sft/tasks/chains/pass@1_low": 0.4,
        "sft/tasks/chains/pass@1_high": 0.6,
        "sft/tasks/chains/pass@2": 0.6,
        "sft/tasks/chains/pass@16": 0.9,
        "sft/tasks/chains/greedy": 0.8,
        "tasks/chains/pass@1": 0.7,
    }
    read = Skill.read(metrics, "sft/", "chains")
    assert read == Skill(Estimate(0.5, 0.4, 0.6), Estimate(0.8), Estimate(0.9), 16)
    assert Skill.read(metrics, "", "chains").pass_at_1 == Estimate(0.7)
    assert Skill.read(metrics, "", "other") is None


def test_estimates_print_as_percent_and_points():
    assert Estimate(0.4712, 0.44, 0.502).as_share() == "47.1 % [44.0, 50.2]"
    assert Estimate(-0.05).as_change() == "-5.0 points"
