"""rmt_loss, divided as Megatron divides, against the dual loss of the whole batch computed directly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rmt.objectives import LossOutput, grpo_loss, ntp_loss, rmt_loss

ROWS, SEQUENCE, VOCABULARY = 6, 5, 7
NEITHER, RL, NTP = 0, 1, 2

# Rows of one step: only RL tokens, only NTP tokens, both kinds, and padding alone.
KINDS = torch.tensor(
    [[RL, RL, RL, 0, 0], [NTP] * 5, [NTP, NTP, RL, RL, RL], [0] * 5, [RL, 0, 0, 0, 0], [NTP, 0, NTP, RL, 0]]
)
# Each split: ranks, of micro-batches, of rows. Ranks have the same number of micro-batches, some of one kind or empty.
SPLITS = {
    "one micro-batch": [[[0, 1, 2, 3, 4, 5]]],
    "a micro-batch per row": [[[0], [1], [2], [3], [4], [5]]],
    "uneven micro-batches": [[[5, 0], [4, 2, 1, 3]]],
    "a rank per kind": [[[0, 4]], [[1]], [[2, 5, 3]]],
    "an empty rank": [[[0, 1], [2, 4, 5]], [[3], []]],
    "a rank per row": [[[row]] for row in range(ROWS)],
}


def step(seed=0):
    """Logits of the step's tokens (with gradient), targets, old logprobs and advantages per response."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, SEQUENCE, VOCABULARY, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS, SEQUENCE), generator=generator)
    old = logprobs_of(logits.detach(), targets) + 0.3 * torch.randn(ROWS, SEQUENCE, generator=generator)
    return logits, targets, old, torch.randn(ROWS, generator=generator)


def logprobs_of(logits, targets):
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def terms(batch, rows, kinds=KINDS, normalize="token"):
    """Both losses of the micro-batch of these rows."""
    logits, targets, old, advantages = (tensor[rows] for tensor in batch)
    logprobs, kinds = logprobs_of(logits, targets), kinds[rows]
    rl = grpo_loss(logprobs, old, advantages, (kinds == RL).long(), normalize=normalize)
    return rl, ntp_loss(logprobs, (kinds == NTP).long())


def totals(kinds=KINDS):
    return {"rl_tokens": int((kinds == RL).sum()), "ntp_tokens": int((kinds == NTP).sum())}


def as_megatron_divides(outputs_by_rank, logits):
    """Loss and gradient: sums over micro-batches, then ranks, divided once by the int32 total of num_tokens."""
    loss, gradient, num_tokens = 0.0, torch.zeros_like(logits), torch.zeros([], dtype=torch.int)
    for outputs in outputs_by_rank:
        for output in outputs:
            (part,) = torch.autograd.grad(output.loss_sum, logits)
            gradient += part
            loss += output.loss_sum.item()
            num_tokens += output.num_tokens.to(torch.int)
    return loss / num_tokens.item(), gradient / num_tokens, num_tokens.item()


def dual_loss(batch, coefficient, kinds=KINDS):
    """The whole step's loss and gradient, from the definition, in float64 and without the library's losses."""
    logits, targets, old, advantages = batch
    is_rl, logprobs = kinds == RL, logprobs_of(logits.double(), targets)
    ratio, advantage = (logprobs - old)[is_rl].exp(), advantages.unsqueeze(-1).expand(-1, SEQUENCE)[is_rl]
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    next_token = F.cross_entropy(logits.double()[kinds == NTP], targets[kinds == NTP])
    loss = policy + coefficient * next_token
    return loss.item(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_split_over_micro_batches_and_ranks_gives_the_dual_loss(split, coefficient):
    batch = step()
    outputs = [
        [rmt_loss(*terms(batch, rows), ntp_coefficient=coefficient, **totals()) for rows in rank] for rank in split
    ]
    loss, gradient, num_tokens = as_megatron_divides(outputs, batch[0])
    expected, expected_gradient = dual_loss(batch, coefficient)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert num_tokens == int((KINDS != NEITHER).sum())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.sampled_from([NEITHER, RL, NTP]), min_size=28, max_size=28),
    st.lists(st.integers(0, 5), min_size=ROWS, max_size=ROWS),
    st.floats(0, 3),
)
def test_any_masks_in_any_split_give_the_dual_loss(seed, kinds, slots, coefficient):
    batch, kinds = step(seed), torch.tensor([RL, NTP, *kinds]).view(ROWS, SEQUENCE)
    splits = [[row for row in range(ROWS) if slots[row] == slot] for slot in range(6)]
    outputs = [rmt_loss(*terms(batch, rows, kinds), ntp_coefficient=coefficient, **totals(kinds)) for rows in splits]
    loss, gradient, _ = as_megatron_divides([outputs[:3], outputs[3:]], batch[0])
    expected, expected_gradient = dual_loss(batch, coefficient, kinds)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_ntp_term_has_the_gradient_of_plain_ntp_on_the_same_mask_and_is_not_zero(split):
    batch, coefficient = step(), 0.1
    silent = (*batch[:3], torch.zeros(ROWS))  # advantages of 0: RL tokens are counted, but have no gradient
    outputs = [
        [rmt_loss(*terms(silent, rows), ntp_coefficient=coefficient, **totals()) for rows in rank] for rank in split
    ]
    _, gradient, _ = as_megatron_divides(outputs, batch[0])
    logits, targets = batch[:2]
    plain = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(KINDS != NTP, -100).flatten())
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(gradient, coefficient * expected)
    moved = gradient.abs().sum(-1) > 0
    assert torch.equal(moved, KINDS == NTP)


def test_more_next_tokens_do_not_make_reinforcement_weaker():
    batch = step()
    fewer = torch.where(KINDS == NTP, NEITHER, KINDS)
    fewer[1, 0] = NTP
    gradients = []
    for kinds in (KINDS, fewer):
        output = rmt_loss(*terms(batch, slice(None), kinds), **totals(kinds))
        _, gradient, _ = as_megatron_divides([[output]], batch[0])
        gradients.append(gradient[KINDS == RL])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("missing", "present"), [(RL, "ntp"), (NTP, "rl")])
def test_a_step_without_one_kind_of_token_is_the_other_term_alone(missing, present):
    batch, kinds = step(), torch.where(KINDS == missing, NEITHER, KINDS)
    rl, ntp = terms(batch, slice(None), kinds)
    output = rmt_loss(rl, ntp, ntp_coefficient=0.5, **totals(kinds))
    alone = 0.5 * ntp.loss_sum / ntp.num_tokens if present == "ntp" else rl.loss_sum / rl.num_tokens
    torch.testing.assert_close(output.loss_sum / output.num_tokens, alone)


def test_a_step_without_any_token_is_zero_and_counts_none():
    output = rmt_loss(*terms(step(), [3]), rl_tokens=0, ntp_tokens=0)
    assert output.loss_sum.item() == 0.0 and output.num_tokens.item() == 0


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_sequence_normalised_reinforcement_counts_responses(split):
    batch = step()
    responses = int((KINDS == RL).any(-1).sum())
    outputs = [
        [
            rmt_loss(*terms(batch, rows, normalize="sequence"), rl_tokens=responses, ntp_tokens=totals()["ntp_tokens"])
            for rows in rank
        ]
        for rank in split
    ]
    loss, _, _ = as_megatron_divides(outputs, batch[0])
    rl, ntp = terms(batch, slice(None), normalize="sequence")
    assert loss == pytest.approx((rl.loss_sum / responses + 0.1 * ntp.loss_sum / ntp.num_tokens).item(), rel=1e-5)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_metrics_added_over_the_split_are_those_of_the_step(split):
    batch = step()
    outputs = [rmt_loss(*terms(batch, rows), **totals()) for rank in split for rows in rank]
    assert all(set(output.metrics) == set(outputs[0].metrics) for output in outputs)
    means = {
        name: (sum(o.metrics[name][0] for o in outputs) / sum(o.metrics[name][1] for o in outputs)).item()
        for name in outputs[0].metrics
    }
    assert set(means) == {"loss", "rl/loss", "rl/ratio_mean", "rl/clip_share", "ntp/loss"}
    assert means["loss"] == pytest.approx(dual_loss(batch, 0.1)[0], rel=1e-5)
    assert means["loss"] == pytest.approx(means["rl/loss"] + 0.1 * means["ntp/loss"], rel=1e-5)
    assert means["ntp/loss"] == pytest.approx(dual_loss(batch, 1.0)[0] - dual_loss(batch, 0.0)[0], rel=1e-5)


def test_metrics_keep_a_group_they_have_and_carry_no_gradient():
    rl, ntp = terms(step(), slice(None))
    rl = LossOutput(rl.loss_sum, rl.num_tokens, {**rl.metrics, "rollout/error": (torch.ones(()), torch.ones(()))})
    output = rmt_loss(rl, ntp, **totals())
    assert "rollout/error" in output.metrics
    assert output.num_tokens.dtype == torch.int64
    assert not any(tensor.requires_grad for pair in output.metrics.values() for tensor in pair)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ntp_coefficient": -0.1}, "ntp_coefficient must not be negative, got -0.1"),
        ({"ntp_coefficient": float("nan")}, "ntp_coefficient must not be negative, got nan"),
        ({"rl_tokens": -1}, "rl_tokens must not be negative, got -1"),
        ({"ntp_tokens": -2}, "ntp_tokens must not be negative, got -2"),
    ],
)
def test_a_negative_coefficient_or_count_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rmt_loss(*terms(step(), slice(None)), **{**totals(), **arguments})
