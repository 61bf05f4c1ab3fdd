"""token_budget against known values and exact integer arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.objectives import token_budget

decays = st.integers(1, 99).map(lambda percent: percent / 100)
stages = st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


def test_the_papers_budget_falls_from_800_to_160():
    assert [token_budget(step, 100) for step in (0, 25, 50, 75, 100)] == [800, 534, 357, 239, 160]


@given(stages, st.integers(1, 5000), decays)
def test_budget_equals_exact_arithmetic(stage, initial, decay):
    step, total = stage
    budget = token_budget(step, total, initial=initial, decay=decay)
    # B ≤ B_0 · γ^(t/T) < B + 1, raised to the power T; a budget at the minimum has only the upper bound.
    power = Fraction(str(decay)) ** step * initial**total
    assert power < Fraction(budget + 1) ** total
    assert budget == 1 or Fraction(budget) ** total <= power


@given(st.integers(1, 4000), decays)
def test_budget_starts_at_the_initial_and_ends_at_the_decayed_one(initial, decay):
    assert token_budget(0, 7, initial=initial, decay=decay) == initial
    assert token_budget(7, 7, initial=initial, decay=decay) == max(1, int(Fraction(str(decay)) * initial))


@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 300), decays)
def test_budget_never_rises_and_never_falls_under_the_minimum(total, minimum, more, decay):
    initial = minimum + more
    budgets = [token_budget(step, total, initial=initial, minimum=minimum, decay=decay) for step in range(total + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == initial and budgets[-1] >= minimum
    assert all(isinstance(budget, int) for budget in budgets)


def test_a_whole_budget_is_not_lost_to_binary_rounding():
    assert 100 * 0.29 < 29 and token_budget(1, 1, initial=100, decay=0.29) == 29


def test_the_minimum_takes_over_where_the_decay_would_go_lower():
    assert [token_budget(step, 2, initial=100, minimum=30, decay=0.04) for step in range(3)] == [100, 30, 30]


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.2, 1.5, float("nan")])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be between 0 and 1"):
        token_budget(0, 10, decay=decay)


@pytest.mark.parametrize("minimum", [0, -1, 801])
def test_a_minimum_above_the_initial_budget_or_below_one_is_refused(minimum):
    with pytest.raises(ValueError, match=f"minimum must be at least 1 and at most initial=800, got {minimum}"):
        token_budget(0, 10, minimum=minimum)


@pytest.mark.parametrize("step", [-1, 11])
def test_budget_of_a_step_outside_the_stage_is_refused(step):
    with pytest.raises(ValueError, match="step must be between 0 and total_steps=10"):
        token_budget(step, 10)
