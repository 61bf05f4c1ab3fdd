"""Token difficulty by the model's entropy: 0 easy, 1 medium, 2 hard (RMT; its thresholds are not published)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assign_tiers(entropy: Tensor, edges: Sequence[float]) -> Tensor:
    """The tier of every token: how many edges its entropy has reached; int64, the shape of ``entropy``.

    entropy: any shape, nats. edges: ascending, nats; two of them make the tiers easy (below the first), medium and
    hard (the second and above). Equal edges, as quantiles of a peaked distribution can be, leave a tier empty.
    Raises ValueError for no edges or edges that descend.
    """
    edges = [float(edge) for edge in edges]
    if not edges:
        raise ValueError("edges must have at least one value, got none")
    if edges != sorted(edges):
        raise ValueError(f"edges must be ascending, got {edges}")
    boundaries = torch.tensor(edges, dtype=torch.float32, device=entropy.device)
    return torch.bucketize(entropy.detach().float().contiguous(), boundaries, right=True)


def tier_edges(entropy: Tensor, quantiles: Sequence[float]) -> tuple[float, ...]:
    """The entropies (nats) below which the given ascending shares of the tokens lie, interpolated linearly.

    entropy: any shape, the measured tokens only (select them with the mask first). quantiles: ascending, in [0, 1].
    Raises ValueError for no tokens or other quantiles.
    """
    quantiles = [float(quantile) for quantile in quantiles]
    if not quantiles or not all(0 <= quantile <= 1 for quantile in quantiles) or quantiles != sorted(quantiles):
        raise ValueError(f"quantiles must be ascending values in [0, 1], got {quantiles}")
    if not entropy.numel():
        raise ValueError("entropy must have at least one token, got none")
    # torch.quantile (2.13) refuses more than 16 million values.
    ordered = entropy.detach().flatten().double().sort().values
    edges = []
    for quantile in quantiles:
        place = quantile * (len(ordered) - 1)
        low, high = ordered[int(place)].item(), ordered[min(int(place) + 1, len(ordered) - 1)].item()
        edges.append(low + (high - low) * (place - int(place)))
    return tuple(edges)
