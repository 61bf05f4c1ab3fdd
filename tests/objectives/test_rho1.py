"""rho1_selection against sorting in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rmt.objectives import ntp_loss, rho1_selection


def batch(shape, seed):
    """Reference and policy logprobs, with ties, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    reference, policy = (-torch.randint(1, 9, shape, generator=generator).float() / 4 for _ in range(2))
    return reference, policy, (torch.rand(shape, generator=generator) > 0.3).long()


def selected_by_sorting(reference, policy, mask, keep):
    """The columns that are trained on, row by row; equal ones in their order."""
    chosen = torch.zeros(mask.shape)
    for row in range(mask.shape[0]):
        columns = [column for column in range(mask.shape[1]) if mask[row, column]]
        columns.sort(key=lambda column: policy[row, column].item() - reference[row, column].item())
        for column in columns[: max(1, round(keep * len(columns)))]:
            chosen[row, column] = 1
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 12)), st.integers(0, 10_000), st.sampled_from([0.1, 0.25, 0.6, 0.75, 1])
)
def test_the_tokens_with_the_largest_excess_loss_are_selected_in_each_row(shape, seed, keep):
    reference, policy, mask = batch(shape, seed)
    selected = rho1_selection(reference, policy, mask, keep=keep)
    assert torch.equal(selected, selected_by_sorting(reference, policy, mask, keep))


def test_a_rows_selection_does_not_depend_on_the_other_rows():
    reference, policy, mask = batch((6, 20), 3)
    together = rho1_selection(reference, policy, mask)
    alone = [rho1_selection(*(each[row : row + 1] for each in (reference, policy, mask))) for row in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_the_loss_is_the_mean_over_the_selected_tokens_alone():
    reference, policy, mask = batch((3, 10), 1)
    policy.requires_grad_()
    selected = rho1_selection(reference, policy, mask, keep=0.5)
    output = ntp_loss(policy, selected)
    loss = output.loss_sum / output.num_tokens
    torch.testing.assert_close(loss, -policy[selected.bool()].mean())
    (gradient,) = torch.autograd.grad(loss, policy)
    assert torch.equal(gradient != 0, selected.bool())


def test_keeping_everything_is_plain_next_token_prediction():
    reference, policy, mask = batch((3, 10), 2)
    assert torch.equal(rho1_selection(reference, policy, mask, keep=1.0), mask.float())


def test_infinite_gaps_at_masked_positions_do_not_count():
    reference = torch.tensor([[torch.inf, -1.0, -3.0]])
    assert rho1_selection(reference, torch.full((1, 3), -2.0), torch.tensor([[0, 1, 1]]), keep=0.5).tolist() == [
        [0, 1, 0]
    ]


def test_shares_that_are_none_are_refused():
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"keep must be above 0 and at most 1, got {keep}"):
            rho1_selection(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), keep=keep)
