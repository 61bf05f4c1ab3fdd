"""The share of a stage that is done."""

from __future__ import annotations

import pytest

from nemo_rmt.objectives.progress import progress


def test_progress_runs_from_zero_to_one():
    assert [progress(step, 4) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_stage_is_refused(step):
    with pytest.raises(ValueError, match=f"step must be between 0 and total_steps=10, got {step}"):
        progress(step, 10)


def test_a_stage_without_steps_is_refused():
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        progress(0, 0)
