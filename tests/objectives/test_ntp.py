"""ntp_loss against F.cross_entropy and plain Python."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_rmt.objectives import ntp_loss


def logits_and_targets(batch=3, sequence=7, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, sequence, vocabulary, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (batch, sequence), generator=generator)
    mask = (torch.rand(batch, sequence, generator=generator) > 0.4).long()
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logits, targets, mask, logprobs


def test_value_and_gradient_equal_cross_entropy_over_the_masked_tokens():
    logits, targets, mask, logprobs = logits_and_targets()
    output = ntp_loss(logprobs, mask)
    (gradient,) = torch.autograd.grad(output.loss_sum / output.num_tokens, logits, retain_graph=True)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(mask == 0, -100).flatten())
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(output.loss_sum / output.num_tokens, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_denominator_is_the_integer_token_count_whatever_the_weights():
    _, _, mask, logprobs = logits_and_targets()
    output = ntp_loss(logprobs, mask, weights=torch.full(mask.shape, 0.8))
    assert output.num_tokens.item() == mask.sum().item()
    assert output.num_tokens.dtype == torch.int64
    torch.testing.assert_close(output.loss_sum, 0.8 * ntp_loss(logprobs, mask).loss_sum)


def test_weighted_sum_equals_a_loop_over_tokens():
    _, _, mask, logprobs = logits_and_targets()
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if mask[row, column]:
                expected -= weights[row, column].item() * logprobs[row, column].item()
    assert ntp_loss(logprobs, mask, weights).loss_sum.item() == pytest.approx(expected, rel=1e-5)


def test_loss_metric_is_the_unweighted_nll_and_detached():
    _, _, mask, logprobs = logits_and_targets()
    plain, weighted = ntp_loss(logprobs, mask), ntp_loss(logprobs, mask, torch.full(mask.shape, 1.2))
    assert set(plain.metrics) == {"loss"} and set(weighted.metrics) == {"loss", "weighted_loss"}
    torch.testing.assert_close(weighted.metrics["loss"], plain.metrics["loss"])
    torch.testing.assert_close(weighted.metrics["weighted_loss"][0], 1.2 * plain.metrics["loss"][0])
    assert not any(tensor.requires_grad for pair in weighted.metrics.values() for tensor in pair)


def test_adding_micro_batches_gives_the_whole_batch():
    _, _, mask, logprobs = logits_and_targets(batch=4)
    whole, parts = ntp_loss(logprobs, mask), [ntp_loss(logprobs[i : i + 1], mask[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum)
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    torch.testing.assert_close(sum(part.metrics["loss"][1] for part in parts), whole.metrics["loss"][1])


def test_infinite_logprobs_outside_the_mask_leave_value_and_gradient_finite():
    logprobs = torch.tensor([[-1.0, -torch.inf, -2.0]], requires_grad=True)
    output = ntp_loss(logprobs, torch.tensor([[1, 0, 1]]))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 3.0
    assert logprobs.grad.tolist() == [[-1.0, 0.0, -1.0]]


def test_other_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"mask must have the shape of logprobs \[2, 3\], got \[2, 4\]"):
        ntp_loss(torch.zeros(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"logprobs must be \[batch, sequence\]"):
        ntp_loss(torch.zeros(3), torch.ones(3))
