"""distill_loss against F.kl_div and F.cross_entropy on whole distributions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_rmt.objectives import distill_loss, ntp_loss


def distributions(batch=3, sequence=5, vocabulary=7):
    """Log-distributions of the reference and the model, the model's with gradient; labels and a mask."""
    generator = torch.Generator().manual_seed(0)
    reference, model = (torch.randn(batch, sequence, vocabulary, generator=generator).double() for _ in range(2))
    labels = torch.randint(vocabulary, (batch, sequence), generator=generator)
    mask = (torch.rand(batch, sequence, generator=generator) > 0.4).long()
    return reference.log_softmax(-1), model.log_softmax(-1).requires_grad_(), labels, mask


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_the_loss_is_the_divergence_and_the_cross_entropy_in_their_shares(coefficient):
    reference, model, labels, mask = distributions()
    logprobs = model.gather(-1, labels[..., None])[..., 0]
    divergence = F.kl_div(model, reference, log_target=True, reduction="none").sum(-1)
    output = distill_loss(logprobs, divergence, mask, coefficient=coefficient)
    kept = mask.bool()
    divergences = F.kl_div(model[kept], reference[kept], log_target=True, reduction="batchmean")
    expected = coefficient * divergences + (1 - coefficient) * F.cross_entropy(model[kept], labels[kept])
    torch.testing.assert_close(output.loss_sum.double() / output.num_tokens, expected, rtol=1e-6, atol=1e-6)
    assert output.num_tokens == mask.sum() and output.num_tokens.dtype == torch.int64
    total, count = output.metrics["distill/divergence"]
    torch.testing.assert_close((total / count).double(), divergences.detach(), rtol=1e-6, atol=1e-6)


def test_the_logged_loss_is_next_token_predictions():
    reference, model, labels, mask = distributions()
    logprobs = model.gather(-1, labels[..., None])[..., 0].float()
    metrics = distill_loss(logprobs, torch.ones_like(logprobs), mask).metrics
    torch.testing.assert_close(metrics["loss"], ntp_loss(logprobs, mask).metrics["loss"])


def test_what_is_not_a_number_at_masked_positions_does_not_count():
    logprobs, divergence = torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.5, torch.nan]], requires_grad=True)
    output = distill_loss(logprobs, divergence, torch.tensor([[1, 0]]))
    output.loss_sum.backward()
    assert output.loss_sum == 0.5 and divergence.grad.tolist() == [[1.0, 0.0]]


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="coefficient must be above 0 and at most 1, got 0"):
        distill_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), coefficient=0)
