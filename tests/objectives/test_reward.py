"""length_reward and combined_reward against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.objectives import combined_reward, length_reward

peaks = st.sampled_from([0.25, 1.0, 3.0])


def triangle(length, budget, peak):
    """Case by case, as the paper words it."""
    if length <= budget:
        return peak * length / budget
    if length < 2 * budget:
        return peak * (2 * budget - length) / budget
    return 0.0


def test_the_triangle_at_its_corners_and_between():
    lengths = torch.tensor([0, 50, 100, 150, 200, 201, 5000])
    assert length_reward(lengths, 100).tolist() == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert length_reward(lengths, 100, peak=4.0).tolist() == [0.0, 2.0, 4.0, 2.0, 0.0, 0.0, 0.0]


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=20), st.integers(1, 1000), peaks)
def test_length_reward_equals_the_triangle_case_by_case(lengths, budget, peak):
    rewards = length_reward(torch.tensor(lengths), budget, peak=peak)
    expected = [triangle(length, budget, peak) for length in lengths]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)
    assert rewards.dtype == torch.float32


@given(st.integers(1, 1000).flatmap(lambda budget: st.tuples(st.just(budget), st.integers(0, budget))), peaks)
def test_as_much_too_short_and_too_long_earn_the_same_and_at_most_the_peak(budget_and_error, peak):
    budget, error = budget_and_error
    short, long = length_reward(budget - error, budget, peak=peak), length_reward(budget + error, budget, peak=peak)
    assert short.item() == long.item()
    assert 0 <= short.item() <= peak and (short.item() == peak) == (error == 0)


def test_length_reward_keeps_the_shape_of_the_lengths():
    assert length_reward(torch.tensor([[5, 10], [15, 20]]), 10).tolist() == [[0.5, 1.0], [0.5, 0.0]]
    assert length_reward(5, 10).item() == 0.5 and length_reward(5, 10).shape == ()
    assert length_reward(torch.zeros(0, dtype=torch.long), 10).shape == (0,)


def test_a_match_and_its_length_are_weighted():
    match, length = torch.tensor([True, True, False, False]), torch.tensor([1.0, 0.5, 1.0, 0.0])
    torch.testing.assert_close(combined_reward(match, length), torch.tensor([1.0, 0.95, 0.1, 0.0]))
    torch.testing.assert_close(combined_reward(match, length, length_weight=0.0), match.float())
    torch.testing.assert_close(combined_reward(match, length, length_weight=1.0), length)
    assert combined_reward(1, 0.5).item() == pytest.approx(0.95)


@given(st.floats(0, 0.49), st.floats(0, 1), st.floats(0, 1))
def test_below_half_a_weight_every_match_earns_more_than_every_miss(weight, length_of_match, length_of_miss):
    match, miss = (
        combined_reward(match, length, length_weight=weight)
        for match, length in ((1, length_of_match), (0, length_of_miss))
    )
    assert match > miss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": torch.tensor([3, -1])}, "length must not be negative, got -1"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"peak": 0.0}, "peak must be above 0, got 0.0"),
    ],
)
def test_wrong_lengths_budgets_and_peaks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        length_reward(**{"length": 3, "budget": 5, **arguments})


def test_a_wrong_weight_and_rewards_of_other_responses_are_refused():
    with pytest.raises(ValueError, match=r"length_weight must be in \[0, 1\], got 1.5"):
        combined_reward(1, 1.0, length_weight=1.5)
    with pytest.raises(ValueError, match=r"length_reward must have the shape of match \[2, 4\], got \[4\]"):
        combined_reward(torch.ones(2, 4), torch.ones(4))
