"""The verdict on what RMT did to one tier of held-out positions, and how its figures are read."""

from __future__ import annotations

import pytest

from nemo_rmt.objectives import wilson_interval
from nemo_rmt.report.estimates import Estimate
from nemo_rmt.report.reasoning import Reasoning, ThoughtLength, judge_reasoning
from nemo_rmt.report.run import StageRecord


def measured(direct, thought, greedy=None, positions=400):
    shares = (None if share is None else share_of(share, positions) for share in (direct, thought, greedy))
    return Reasoning(positions, *shares)


def share_of(share, positions):
    return Estimate(*wilson_interval(round(share * positions), positions))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (measured(0.20, 0.30, 0.40), measured(0.20, 0.15, 0.60), "worse"),
        (measured(0.20, 0.30, 0.40), measured(0.40, 0.33, 0.60), "no change"),
        (measured(0.20, 0.30, 0.60), measured(0.20, 0.58, 0.61), "sharpening"),
        (measured(0.20, 0.30, 0.40), measured(0.20, 0.55, 0.60), "better"),
        (measured(0.60, 0.05, 0.05), measured(0.60, 0.58, 0.60), "caught up"),
        (measured(0.20, 0.30), measured(0.20, 0.55), "undecided"),
    ],
)
def test_the_verdict_follows_the_numbers(before, after, verdict):
    assert judge_reasoning(before, after) == verdict


def test_greedy_thoughts_that_still_fail_are_no_sharpening_when_sampled_ones_pass_what_greedy_ones_reached():
    assert judge_reasoning(measured(0.02, 0.02, 0.0), measured(0.02, 0.30, 0.0)) == "better"
    assert judge_reasoning(measured(0.30, 0.02, 0.0), measured(0.30, 0.30, 0.0)) == "caught up"


def test_few_positions_show_no_difference():
    assert judge_reasoning(measured(0.2, 0.3, 0.4, 10), measured(0.2, 0.5, 0.6, 10)) == "no change"


def test_positions_are_read_with_the_models_prefix():
    metrics = {
        "rmt/tokens/hard/positions": 400.0,
        "rmt/tokens/hard/ntp": 0.2,
        "rmt/tokens/hard/ntr": 0.5,
        "rmt/tokens/hard/ntr_low": 0.45,
        "rmt/tokens/hard/ntr_high": 0.55,
        "rmt/tokens/hard/ntr_greedy": 0.6,
        "rmt/tokens/hard/format_rate": 0.8,
        "tokens/hard/positions": 0.0,
        "tokens/hard/accuracy": 0.3,
    }
    read = Reasoning.read(metrics, "rmt", "hard")
    assert (read.positions, read.direct, read.thought) == (400, Estimate(0.2), Estimate(0.5, 0.45, 0.55))
    assert read.greedy == Estimate(0.6) and read.think_length is None
    assert read.right_when_formed == pytest.approx(0.625)
    assert Reasoning.read(metrics, "rl", "hard") is None and Reasoning.read(metrics, "rmt", "easy") is None


def steps(lengths, budgets=()):
    records = [{"step": number, "rmt/think_length": length} for number, length in enumerate(lengths, 1)]
    for record, budget in zip(records, budgets):
        record["rmt/budget"] = budget
    return records


def test_thought_length_is_of_the_first_and_last_tenth_and_the_budget_of_the_last_step():
    lengths = [30.0, 20.0, *[1000.0] * 16, 8.0, 4.0]
    stage = StageRecord(0, "rmt", "rmt", "done", steps=steps(lengths, range(40, 20, -1)))
    assert ThoughtLength.read(stage) == ThoughtLength(25.0, 6.0, 21)


def test_thought_length_of_a_stage_of_few_steps_is_of_one_and_needs_no_budget():
    assert ThoughtLength.read(StageRecord(0, "rmt", "rmt", "done", steps=steps([9.0, 5.0, 3.0]))) == ThoughtLength(
        9, 3, None
    )


@pytest.mark.parametrize("status", ["running", "failed", "pending"])
def test_a_stage_that_is_not_done_has_no_length_at_its_end(status):
    assert ThoughtLength.read(StageRecord(0, "rmt", "rmt", status, steps=steps([9.0] * 20))) is None
