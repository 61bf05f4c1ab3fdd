"""Next-token prediction, optionally with a weight per token (ReMiT's soft-reweighted cross-entropy)."""

from __future__ import annotations

from torch import Tensor

from nemo_rmt.objectives.output import LossOutput, masked, mean_metric, require_same_shape


def ntp_loss(logprobs: Tensor, mask: Tensor, weights: Tensor | None = None) -> LossOutput:
    """−Σ w·logprob over the mask, normalised by the mask's token count and never by Σw.

    With Σw below the line, a batch of mostly down-weighted tokens would be scaled up again, and the weights
    would only redistribute within a batch (ReMiT, arXiv 2602.03075, divides by the number of tokens).

    logprobs: ``[batch, sequence]``, nats, of the target token at each position.
    mask: ``[batch, sequence]``, 0/1 over predicted tokens.
    weights: ``[batch, sequence]``, or None for plain cross-entropy.

    Metrics: ``loss``, the unweighted nll whatever the weights; ``weighted_loss`` when weights are given.
    """
    require_same_shape(logprobs=logprobs, mask=mask, weights=weights)
    nll = -masked(logprobs, mask)
    weighted = nll if weights is None else masked(weights, mask) * nll
    metrics = {"loss": mean_metric(nll, mask)}
    if weights is not None:
        metrics["weighted_loss"] = mean_metric(weighted, mask)
    return LossOutput(weighted.sum(), mask.bool().sum(), metrics)
