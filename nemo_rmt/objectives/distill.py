"""Distillation: the reference's whole distribution of the next token as the target (arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from nemo_rmt.objectives.output import LossOutput, masked, mean_metric, require_same_shape


def distill_loss(logprobs: Tensor, divergence: Tensor, mask: Tensor, *, coefficient: float = 1.0) -> LossOutput:
    """Sum over the masked tokens of c·KL(p_ref ‖ p_θ) − (1 − c)·log p_θ(label).

    logprobs: ``[batch, sequence]``, nats, of the labels under the model in training.
    divergence: ``[batch, sequence]``, nats: KL of the reference's distribution from the model's, over the whole
        vocabulary; with gradient.
    mask: ``[batch, sequence]``, 0/1. coefficient: c, in (0, 1]; 1 leaves the corpus's own token out.

    Metrics: ``loss``, the labels' mean negative log-likelihood, as every annealing objective reports it; and
    ``distill/divergence``, the mean KL, and ``distill/loss``, the mean of what is trained on.
    Raises ValueError for other shapes or ranges.
    """
    require_same_shape(logprobs=logprobs, divergence=divergence, mask=mask)
    if not 0 < coefficient <= 1:
        raise ValueError(f"coefficient must be above 0 and at most 1, got {coefficient}")
    losses = masked(coefficient * divergence - (1 - coefficient) * logprobs, mask)
    metrics = {
        "loss": mean_metric(-logprobs, mask),
        "distill/loss": mean_metric(losses, mask),
        "distill/divergence": mean_metric(divergence, mask),
    }
    return LossOutput(losses.sum(), mask.bool().sum(), metrics)
