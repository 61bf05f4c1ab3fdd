"""ReMiT: token weights from the gap between an RL-tuned reference and the model (arXiv 2602.03075).

Two independent readings of the paper agree on the gap of the frozen RL reference against the current model, its
centring within the sequence, the sigmoid and the bounded clip. The factor 2 and epsilon 0.2 come from one of them.
The paper does not say whether gradients flow through the weights; here they do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rmt.objectives.output import Metric, masked, require_same_shape

WIDEST_GAP = 2.0
"""Nats; half the width of the gap's histogram. With scale 1 a gap of 2 from the mean has the weight 1.76."""


def remit_weights(
    reference_logprobs: Tensor,
    policy_logprobs: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    scale: float = 1.0,
    segment_ids: Tensor | None = None,
    centred: bool = True,
) -> Tensor:
    """w = clip(2·σ(scale·(Δ − mean Δ)), 1−ε, 1+ε) with Δ = log p_RL − log p_θ; detached float32 ``[batch, sequence]``.

    reference_logprobs, policy_logprobs: ``[batch, sequence]``, nats, of the target token.
    mask: ``[batch, sequence]``, 0/1; positions without it get weight 0 and do not enter the mean.
    epsilon: in (0, 1]; scale: above 0.
    segment_ids: ``[batch, sequence]`` integers naming the document of each token within its row (any values);
        Δ is then centred within each document instead of each row.
    centred: False leaves the mean in: what the reference likes less on the whole then weighs less on the whole.

    Equal models give exactly 1. Raises ValueError for other shapes or ranges.
    """
    require_same_shape(
        reference_logprobs=reference_logprobs, policy_logprobs=policy_logprobs, mask=mask, segment_ids=segment_ids
    )
    _require_epsilon(epsilon)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    gap = masked(reference_logprobs.detach().float() - policy_logprobs.detach().float(), mask)
    if centred:
        gap = gap - _segment_mean(gap, mask, segment_ids)
    weights = 2 * torch.sigmoid(scale * gap)
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
    # Documents numbered within their rows by sorting, not by torch.unique: how many there are stays on the GPU.
    ordered, order = segment_ids.sort(-1)
    starts = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    number = torch.empty_like(order).scatter_(-1, order, starts.cumsum(-1))
    sums, counts = (torch.zeros_like(gap).scatter_add_(-1, number, values) for values in (gap, counted))
    return (sums / counts.clamp_(min=1)).float().gather(-1, number)


def remit_metrics(weights: Tensor, gap: Tensor, mask: Tensor, epsilon: float, bins: int = 20) -> dict[str, Metric]:
    """What the weights look like, as (sum, count) pairs over the masked tokens.

    weights: from :func:`remit_weights`; gap: Δ before centring, nats; mask: 0/1; all ``[batch, sequence]``.

    ``weight_mean``; ``weight_square``, the mean of w² (with the mean it gives :func:`standard_deviation`);
    ``share_low`` and ``share_high``, the share of tokens at each clip bound; ``gap_mean`` and ``gap_abs``, the means of
    Δ and |Δ|, nats; ``weight_hist``, the share of tokens in each of ``bins`` equal bins over [1−ε, 1+ε], and
    ``gap_hist``, that of Δ over [−2, 2] nats with what lies beyond in the outer bins, sums of shape ``[bins]``.
    """
    require_same_shape(weights=weights, gap=gap, mask=mask)
    _require_epsilon(epsilon)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    weights, kept = weights.detach().float(), mask.bool()
    count = kept.sum().float()
    # Measured from the middle, so that a weight of exactly 1 falls on the same side of a bin edge for every epsilon.
    place = ((weights - 1) / (2 * epsilon) + 0.5) * bins
    gap = gap.detach().float()
    low, high = weights <= 1 - epsilon, weights >= 1 + epsilon
    means = {
        "weight_mean": weights,
        "weight_square": weights.square(),
        "share_low": low.float(),
        "share_high": high.float(),
        "gap_mean": gap,
        "gap_abs": gap.abs(),
    }
    sums = torch.stack(list(means.values())).masked_fill_(~kept, 0.0).sum((1, 2))
    metrics = {name: (total, count) for name, total in zip(means, sums, strict=True)}
    metrics["weight_hist"] = (_histogram(place, kept, bins), count)
    metrics["gap_hist"] = (_histogram((gap / (2 * WIDEST_GAP) + 0.5) * bins, kept, bins), count)
    return metrics


def _histogram(place: Tensor, kept: Tensor, bins: int) -> Tensor:
    """``[bins]`` float32, how many kept tokens are in each bin. place: the bin, a real number."""
    numbers = place.masked_fill(~kept, 0.0).long().clamp_(0, bins - 1)
    return torch.zeros(bins, device=place.device).scatter_add_(0, numbers.flatten(), kept.float().flatten())


def standard_deviation(mean: float, mean_square: float) -> float:
    """Population standard deviation from a mean and a mean of squares; rounding below 0 counts as 0."""
    return max(0.0, mean_square - mean * mean) ** 0.5


def _require_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be above 0 and at most 1, got {epsilon}")
