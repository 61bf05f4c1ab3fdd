"""group_advantages and grpo_loss against plain Python and the plain policy gradient."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rmt.objectives import group_advantages, grpo_loss

rewards_of_groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.floats(-10, 10, width=32), min_size=size, max_size=size), min_size=1, max_size=4)
)


def rollouts(batch=4, sequence=6, seed=0):
    """Policy (with gradient), old, reference and sampler logprobs, advantages and mask."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(batch, sequence, generator=generator)
    policy, reference, sampler = ((old + 0.4 * torch.randn(batch, sequence, generator=generator)) for _ in range(3))
    advantages = torch.randn(batch, generator=generator)
    mask = (torch.rand(batch, sequence, generator=generator) > 0.3).long()
    mask[:, 0] = 1
    return policy.requires_grad_(), old, reference, sampler, advantages, mask


def loss_by_loops(policy, old, advantages, mask, *, low, high, beta=0.0, reference=None, sampler=None, cap=None):
    """Per-response lists of token losses in plain Python."""
    responses = []
    for row in range(mask.shape[0]):
        tokens = []
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
            ratio = math.exp(policy[row, column] - old[row, column])
            advantage = advantages[row].item()
            token = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            if sampler is not None:
                token *= min(math.exp(old[row, column] - sampler[row, column]), cap)
            if reference is not None:
                delta = (reference[row, column] - policy[row, column]).item()
                token += beta * (math.exp(delta) - delta - 1)
            tokens.append(token)
        responses.append(tokens)
    return responses


@settings(max_examples=50, deadline=None)
@given(rewards_of_groups, st.booleans())
def test_advantages_of_a_group_add_up_to_zero(rewards, normalize_std):
    advantages = group_advantages(torch.tensor(rewards), normalize_std=normalize_std)
    assert advantages.sum(-1).abs().max().item() < 1e-4
    assert advantages.dtype == torch.float32


def test_advantages_use_the_population_standard_deviation():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    expected = torch.tensor([[(reward - mean) / (deviation + 1e-6) for reward in rewards]])
    torch.testing.assert_close(group_advantages(torch.tensor([rewards])), expected)
    plain = group_advantages(torch.tensor([rewards]), normalize_std=False)
    torch.testing.assert_close(plain, torch.tensor([[reward - mean for reward in rewards]]))


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9), st.booleans())
def test_a_group_without_variance_gets_exact_zeros(reward, size, normalize_std):
    advantages = group_advantages(torch.full((1, size), reward), normalize_std=normalize_std)
    assert advantages.tolist() == [[0.0] * size]


@pytest.mark.parametrize("shape", [(4,), (2, 1), (1, 2, 3)])
def test_rewards_that_form_no_groups_are_refused(shape):
    with pytest.raises(ValueError, match=r"rewards must be \[groups, G\] with G at least 2"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_loss_equals_a_loop_over_tokens(seed, normalize):
    policy, old, reference, sampler, advantages, mask = rollouts(seed=seed)
    output = grpo_loss(
        policy,
        old,
        advantages,
        mask,
        clip_low=0.2,
        clip_high=0.3,
        normalize=normalize,
        kl_coefficient=0.1,
        reference_logprobs=reference,
        rollout_logprobs=sampler,
        importance_cap=1.1,
    )
    responses = loss_by_loops(
        policy.detach(),
        old,
        advantages,
        mask,
        low=0.2,
        high=0.3,
        beta=0.1,
        reference=reference,
        sampler=sampler,
        cap=1.1,
    )
    tokens = [token for response in responses for token in response]
    means = [statistics.fmean(response) for response in responses]
    expected = statistics.fmean(tokens if normalize == "token" else means)
    assert (output.loss_sum / output.num_tokens).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    total, count = output.metrics["loss"]
    assert (total / count).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert output.num_tokens.dtype == torch.int64
    assert not any(tensor.requires_grad for pair in output.metrics.values() for tensor in pair)


def test_sequence_normaliser_counts_only_responses_with_tokens():
    policy, old, _, _, advantages, mask = rollouts()
    mask[2] = 0
    output = grpo_loss(policy, old, advantages, mask, normalize="sequence")
    assert output.num_tokens.item() == 3
    assert grpo_loss(policy, old, advantages, mask).num_tokens.item() == mask.sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_responses_that_share_a_row_count_like_responses_in_rows_of_their_own(seed):
    policy, old, reference, _, advantages, mask = rollouts(batch=6, seed=seed)
    mask[4] = 0  # and a response without a token counts in neither layout
    settings_ = {"normalize": "sequence", "kl_coefficient": 0.1}
    apart = grpo_loss(policy, old, advantages, mask, reference_logprobs=reference, **settings_)
    (expected,) = torch.autograd.grad(apart.loss_sum, policy)
    # Two rows of three responses each, whose tokens stand in any order; both rows use the same ids.
    ids = torch.tensor([7, 0, 3, 0, 3, 7])[:, None].expand_as(mask)
    advantages = advantages[:, None].expand_as(policy)
    order = torch.randperm(3 * policy.shape[1], generator=torch.Generator().manual_seed(seed))
    packed = [tensor.reshape(2, -1)[:, order] for tensor in (policy, old, advantages, mask, ids, reference)]
    together = grpo_loss(*packed[:4], response_ids=packed[4], reference_logprobs=packed[5], **settings_)
    (found,) = torch.autograd.grad(together.loss_sum, policy)
    assert together.num_tokens.item() == apart.num_tokens.item() == 5
    torch.testing.assert_close(together.loss_sum, apart.loss_sum)
    torch.testing.assert_close(found, expected)


def test_sequence_normaliser_without_any_token_leaves_nothing():
    policy, old, _, _, advantages, mask = rollouts()
    output = grpo_loss(policy, old, advantages, torch.zeros_like(mask), normalize="sequence")
    output.loss_sum.backward()
    assert output.loss_sum.item() == output.num_tokens.item() == policy.grad.abs().sum().item() == 0


def test_on_policy_gradient_equals_the_plain_policy_gradient():
    policy, _, _, _, advantages, mask = rollouts()
    (gradient,) = torch.autograd.grad(grpo_loss(policy, policy.detach(), advantages, mask).loss_sum, policy)
    (expected,) = torch.autograd.grad(-(advantages.unsqueeze(-1) * policy * mask).sum(), policy)
    torch.testing.assert_close(gradient, expected)


def test_advantages_per_response_and_per_token_agree():
    policy, old, _, _, advantages, mask = rollouts()
    per_token = advantages.unsqueeze(-1).expand(-1, mask.shape[1])
    assert torch.equal(
        grpo_loss(policy, old, advantages, mask).loss_sum, grpo_loss(policy, old, per_token, mask).loss_sum
    )


def test_tokens_beyond_the_clip_get_no_gradient_and_are_counted():
    old = torch.zeros(1, 4)
    policy = torch.tensor([[1.3, 1.3, 0.7, 0.7]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    output = grpo_loss(policy, old, advantages, torch.ones(1, 4))
    output.loss_sum.backward()
    clipped = [gradient == 0 for gradient in policy.grad[0].tolist()]
    assert clipped == [True, False, False, True]
    total, count = output.metrics["clip_share"]
    assert (total / count).item() == 0.5
    total, count = output.metrics["ratio_mean"]
    assert (total / count).item() == pytest.approx(1.0)


def test_kl_is_zero_for_equal_models_and_never_negative():
    policy, old, reference, _, advantages, mask = rollouts()
    same = grpo_loss(policy, old, advantages, mask, kl_coefficient=0.5, reference_logprobs=policy.detach())
    assert same.metrics["kl"][0].item() == 0.0
    torch.testing.assert_close(same.loss_sum, grpo_loss(policy, old, advantages, mask).loss_sum)
    other = grpo_loss(policy, old, advantages, mask, kl_coefficient=0.5, reference_logprobs=reference)
    assert other.metrics["kl"][0].item() > 0
    assert "kl" not in grpo_loss(policy, old, advantages, mask).metrics


def test_zero_advantages_give_zero_loss_and_gradient():
    policy, old, _, _, advantages, mask = rollouts()
    loss = grpo_loss(policy, old, torch.zeros_like(advantages), mask).loss_sum
    loss.backward()
    assert loss.item() == 0 and policy.grad.abs().sum().item() == 0


def test_infinite_logprobs_outside_the_mask_leave_value_and_gradient_finite():
    policy = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0]])
    output = grpo_loss(
        policy,
        old,
        torch.ones(1),
        torch.tensor([[1, 0]]),
        kl_coefficient=0.1,
        reference_logprobs=torch.full((1, 2), -torch.inf).where(torch.tensor([[False, True]]), old),
    )
    output.loss_sum.backward()
    assert output.loss_sum.item() == -1.0 and policy.grad.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"clip_low": 0.0}, "clip_low must be between 0 and 1"),
        ({"clip_high": -0.1}, "clip_high must be above 0"),
        ({"normalize": "batch"}, "normalize must be 'token' or 'sequence', got 'batch'"),
        ({"kl_coefficient": 0.1}, "kl_coefficient=0.1 needs reference_logprobs"),
        ({"kl_coefficient": -0.1}, "kl_coefficient must not be negative"),
        ({"importance_cap": 2.0}, "importance_cap must be above 0 and needs rollout_logprobs"),
    ],
)
def test_wrong_settings_are_refused(settings_, message):
    policy, old, _, _, advantages, mask = rollouts()
    with pytest.raises(ValueError, match=message):
        grpo_loss(policy, old, advantages, mask, **settings_)


def test_advantages_of_another_batch_are_refused():
    policy, old, _, _, advantages, mask = rollouts()
    with pytest.raises(ValueError, match="advantages must have the shape of logprobs"):
        grpo_loss(policy, old, advantages[:2].unsqueeze(-1), mask)
