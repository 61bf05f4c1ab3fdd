"""Which steps are skipped, against the limit computed otherwise, and that a skipped one changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
from guard_worker import LAYOUTS
from hypothesis import given
from hypothesis import strategies as st
from torchrun import run_ranks

from nemo_rmt.megatron.guard import FULL_ENOUGH, WINDOW, Guard

WORKER = Path(__file__).with_name("guard_worker.py")


def guarded(steps: list[tuple[float, float]], skip_spikes: float | None = 6.0) -> list[bool]:
    """What a new guard says to each (loss, gradient norm)."""
    guard = Guard(skip_spikes)
    return [guard.accepts(loss, norm) for loss, norm in steps]


def steady(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses around 2 and gradient norms around 1, with deviations of a tenth."""
    return numpy.random.default_rng(seed).normal([2.0, 1.0], 0.1, (count, 2)).tolist()


@given(
    steps=st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=1, max_size=60),
    seed=st.integers(0, 99),
    k=st.floats(1, 8),
)
def test_a_spike_is_above_the_mean_by_so_many_deviations_of_the_last_accepted_steps(steps, seed, k):
    accepted = []
    everything = steady(WINDOW + 20, seed) + steps
    for step, found in zip(everything, guarded(everything, k), strict=True):
        window = numpy.array(accepted[-WINDOW:])
        expected = True
        if len(window) >= FULL_ENOUGH:
            deviation = numpy.maximum(window.std(axis=0, ddof=1), 0.01 * window.mean(axis=0))
            expected = bool((step <= window.mean(axis=0) + k * deviation).all())
        assert found == expected
        if expected:
            accepted.append(step)


@pytest.mark.parametrize("spike", [(20.0, 1.0), (2.0, 10.0)], ids=["loss", "gradient"])
def test_the_loss_and_the_gradient_norm_are_each_enough(spike):
    assert guarded([*steady(FULL_ENOUGH), spike])[-1] is False
    assert guarded([*steady(FULL_ENOUGH), spike], None)[-1] is True


def test_there_is_no_limit_before_the_window_is_full_enough():
    assert all(guarded([*steady(FULL_ENOUGH - 1), (1e6, 1e6)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1], ids=["loss", "gradient"])
@pytest.mark.parametrize("skip_spikes", [None, 6.0])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad, place, skip_spikes):
    step = [2.0, 1.0]
    step[place] = bad
    guard = Guard(skip_spikes)
    assert not guard.accepts(*step)
    assert guard.report()[0].reason == f"the {'loss' if place == 0 else 'gradient norm'} is not finite"
    assert all(guard.accepts(*each) for each in steady(WINDOW))  # and leaves no trace in the window


def test_a_level_that_has_risen_for_good_does_not_become_the_norm():
    assert guarded(steady(WINDOW) + [(2.0, 10.0)] * 50)[-50:] == [False] * 50


def test_a_policy_gradients_loss_around_zero_is_not_judged():
    signs = numpy.random.default_rng(1).normal(0, 1e-9, WINDOW).tolist()
    assert all(guarded([*((loss, 1.0 + loss) for loss in signs), (0.05, 1.0)]))


def test_a_step_with_a_gradient_after_many_without_is_no_spike():
    assert all(guarded([(0.0, 0.0)] * (2 * WINDOW) + steady(5)))


def test_values_that_hardly_differ_are_no_reason_to_skip_one_that_does_by_little():
    assert all(guarded([(2.0, 1.0)] * WINDOW + [(2.05, 1.02)]))
    assert not guarded([(2.0, 1.0)] * WINDOW + [(2.2, 1.0)])[-1]


def test_skipped_steps_are_counted_reported_once_and_in_a_row():
    guard = Guard(None)
    counts = []
    for loss in (1.0, math.nan, math.nan, 1.0, math.nan):
        guard.accepts(loss, 1.0)
        counts.append((guard.skipped_steps, guard.in_a_row))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert len(guard.report()) == 3 and guard.report() == []


@given(split=st.integers(0, 2 * WINDOW), seed=st.integers(0, 9))
def test_a_guard_restored_anywhere_decides_the_same(split, seed):
    steps = steady(2 * WINDOW, seed)
    for spike in range(70, 2 * WINDOW, 7):
        steps[spike] = (2.0, 1.0 + 0.1 * (spike % 15))
    steps[100] = steps[101] = (math.nan, 1.0)
    whole, before, after = Guard(6.0), Guard(6.0), Guard(6.0)
    decisions = [before.accepts(*step) for step in steps[:split]]
    after.restore(before.state())
    decisions += [after.accepts(*step) for step in steps[split:]]
    assert decisions == [whole.accepts(*step) for step in steps]
    assert after.state() == whole.state() and not all(decisions)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_are_on_every_rank(name):
    run_ranks(WORKER, LAYOUTS[name][0], name)
