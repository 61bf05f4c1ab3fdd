"""ReMiT: token weights from the gap between an RL-tuned reference and the model (arXiv 2602.03075).

Two independent readings of the paper agree on the gap of the frozen RL reference against the current model, its
centring within the sequence, the sigmoid and the bounded clip. The factor 2 and epsilon 0.2 come from one of them.
The paper does not say whether gradients flow through the weights; here they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rmt.objectives.output import Metric, masked, mean_metric, require_same_shape


def remit_weights(
    reference_logprobs: Tensor,
    policy_logprobs: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    scale: float = 1.0,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """w = clip(2·σ(scale·(Δ − mean Δ)), 1−ε, 1+ε) with Δ = log p_RL − log p_θ; detached float32 ``[batch, sequence]``.

    reference_logprobs, policy_logprobs: ``[batch, sequence]``, nats, of the target token.
    mask: ``[batch, sequence]``, 0/1; positions without it get weight 0 and do not enter the mean.
    epsilon: in (0, 1]; scale: above 0.
    segment_ids: ``[batch, sequence]`` integers naming the document of each token within its row (any values);
        Δ is then centred within each document instead of each row.

    Equal models give exactly 1. Raises ValueError for other shapes or ranges.
    """
    require_same_shape(
        reference_logprobs=reference_logprobs, policy_logprobs=policy_logprobs, mask=mask, segment_ids=segment_ids
    )
    _require_epsilon(epsilon)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    gap = masked(reference_logprobs.detach().float() - policy_logprobs.detach().float(), mask)
    weights = 2 * torch.sigmoid(scale * (gap - _segment_mean(gap, mask, segment_ids)))
    return masked(weights.clamp(1 - epsilon, 1 + epsilon), mask)


def _segment_mean(gap: Tensor, mask: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Mean of the masked gap of each token's row, or document; float32, broadcastable to ``[batch, sequence]``.

    Summed in float64: atomics on a GPU add in any order, and a document packed with others must get the mean
    it gets alone.
    """
    gap, counted = gap.double(), mask.bool().double()
    if segment_ids is None:
        return (gap.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)).float()
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
    names, compact = torch.unique(segment_ids, return_inverse=True)
    rows = torch.arange(gap.shape[0], device=gap.device).unsqueeze(-1)
    index = (rows * len(names) + compact).flatten()
    sums = gap.new_zeros(gap.shape[0] * len(names)).scatter_add(0, index, gap.flatten())
    counts = torch.zeros_like(sums).scatter_add(0, index, counted.flatten())
    return (sums / counts.clamp(min=1))[index].view_as(gap).float()


def remit_metrics(weights: Tensor, gap: Tensor, mask: Tensor, epsilon: float, bins: int = 20) -> dict[str, Metric]:
    """What the weights look like, as (sum, count) pairs over the masked tokens.

    weights: from :func:`remit_weights`; gap: Δ before centring, nats; mask: 0/1; all ``[batch, sequence]``.

    ``weight_mean``; ``weight_square``, the mean of w² (with the mean it gives :func:`standard_deviation`);
    ``share_low`` and ``share_high``, the share of tokens at each clip bound; ``gap_mean``, nats; and
    ``weight_hist``, the share of tokens in each of ``bins`` equal bins over [1−ε, 1+ε], its sum of shape ``[bins]``.
    """
    require_same_shape(weights=weights, gap=gap, mask=mask)
    _require_epsilon(epsilon)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    weights, gap = weights.detach().float(), gap.detach()
    # Measured from the middle, so that a weight of exactly 1 falls on the same side of a bin edge for every epsilon.
    place = ((weights - 1) / (2 * epsilon) + 0.5) * bins
    histogram = torch.zeros(bins, device=weights.device).scatter_add(
        0, place.long().clamp(0, bins - 1).flatten(), mask.bool().float().flatten()
    )
    return {
        "weight_mean": mean_metric(weights, mask),
        "weight_square": mean_metric(weights.square(), mask),
        "share_low": mean_metric((weights <= torch.full_like(weights, 1 - epsilon)).float(), mask),
        "share_high": mean_metric((weights >= torch.full_like(weights, 1 + epsilon)).float(), mask),
        "gap_mean": mean_metric(gap, mask),
        "weight_hist": (histogram, mask.bool().sum().float()),
    }


def standard_deviation(mean: float, mean_square: float) -> float:
    """Population standard deviation from a mean and a mean of squares; rounding below 0 counts as 0."""
    return max(0.0, mean_square - mean * mean) ** 0.5


def _require_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be above 0 and at most 1, got {epsilon}")
