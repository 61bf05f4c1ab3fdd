"""tier_probabilities against known values and numpy's interpolation."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.objectives import tier_probabilities

stages = st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
probabilities = (
    st.lists(st.integers(0, 100), min_size=3, max_size=3)
    .filter(any)
    .map(lambda weights: tuple(weight / sum(weights) for weight in weights))
)
transitions = st.sampled_from([(0.3, 0.7), (0.0, 1.0), (0.1, 0.2), (0.5, 1.0)])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (0.6, 0.3, 0.1)),
        (30, (0.6, 0.3, 0.1)),
        (40, (0.475, 0.3, 0.225)),
        (50, (0.35, 0.3, 0.35)),
        (70, (0.1, 0.3, 0.6)),
        (100, (0.1, 0.3, 0.6)),
    ],
)
def test_the_default_curriculum_moves_from_easy_to_hard_between_30_and_70_percent(step, expected):
    values = tier_probabilities(step, 100)
    assert values == pytest.approx(expected)
    assert sum(values) == pytest.approx(1.0, abs=1e-12)


@given(stages, probabilities, probabilities, transitions)
def test_probabilities_are_a_clipped_straight_line_and_sum_to_one(stage, early, late, transition):
    step, total = stage
    values = tier_probabilities(step, total, early=early, late=late, transition=transition)
    expected = [numpy.interp(step / total, transition, ends) for ends in zip(early, late, strict=True)]
    assert values == pytest.approx(expected, abs=1e-12)
    assert sum(values) == pytest.approx(1.0, abs=1e-12) and min(values) >= 0


@given(stages)
def test_equal_ends_leave_no_curriculum(stage):
    thirds = (1 / 3, 1 / 3, 1 / 3)
    assert tier_probabilities(*stage, early=thirds, late=thirds) == pytest.approx(thirds)


@given(st.integers(1, 200))
def test_hard_tokens_never_become_rarer(total):
    hard = [tier_probabilities(step, total)[2] for step in range(total + 1)]
    assert hard == sorted(hard)


@pytest.mark.parametrize("name", ["early", "late"])
@pytest.mark.parametrize("values", [(0.6, 0.3, 0.2), (0.5, 0.3, 0.1), (1.2, -0.3, 0.1), (float("nan"), 0.5, 0.5), ()])
def test_values_that_are_no_probabilities_are_refused(name, values):
    with pytest.raises(ValueError, match=f"{name} must be probabilities that sum to 1"):
        tier_probabilities(0, 10, **{name: values})


def test_thirds_as_people_write_them_are_accepted():
    assert tier_probabilities(0, 10, early=(0.333333, 0.333333, 0.333333))[0] == pytest.approx(1 / 3, abs=1e-5)


def test_another_number_of_tiers_early_than_late_is_refused():
    with pytest.raises(ValueError, match="one probability per tier, got 2 and 3"):
        tier_probabilities(0, 10, early=(0.5, 0.5))


@pytest.mark.parametrize("transition", [(0.7, 0.3), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_a_transition_out_of_order_is_refused(transition):
    with pytest.raises(ValueError, match=r"transition must be two ascending shares in \[0, 1\]"):
        tier_probabilities(0, 10, transition=transition)


@pytest.mark.parametrize("step", [-1, 11])
def test_probabilities_of_a_step_outside_the_stage_are_refused(step):
    with pytest.raises(ValueError, match="step must be between 0 and total_steps=10"):
        tier_probabilities(step, 10)
