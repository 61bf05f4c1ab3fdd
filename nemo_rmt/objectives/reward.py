"""RMT's reward of one response: the right token, after thinking for as long as asked (arXiv 2509.24375)."""

from __future__ import annotations

import torch
from torch import Tensor


def length_reward(length: Tensor | int, budget: int, *, peak: float = 1.0) -> Tensor:
    """A triangle: 0 at length 0, ``peak`` at the budget, 0 again at twice the budget and beyond, linear between.

    length: tokens inside ``<think></think>``, a tensor of any shape or one number.
    budget: B_t of the step (:func:`~nemo_rmt.objectives.token_budget`), tokens, at least 1.

    Returns float32 of the shape of ``length`` (0-d for a number). The triangle is the paper's; a peak of 1, the reward
    of a match, is ours. Raises ValueError for a negative length, a budget below 1 or a peak not above 0.
    """
    length = torch.as_tensor(length).detach()
    if bool((length < 0).any()):
        raise ValueError(f"length must not be negative, got {length.min().item()}")
    if not budget >= 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    if not peak > 0:
        raise ValueError(f"peak must be above 0, got {peak}")
    return peak * (1 - (length.float() - budget).abs() / budget).clamp(min=0)


def combined_reward(match: Tensor | float, length_reward: Tensor | float, *, length_weight: float = 0.1) -> Tensor:
    """(1 − w)·match + w·length_reward; float32, the shape of the arguments (0-d for numbers).

    match: 1 (True) where the predicted token equals the corpus token, else 0; one value per response.
    length_reward: what :func:`length_reward` gives for the same responses.
    length_weight: w, in [0, 1]; 0 is the ablation without length reward.

    The paper combines the two rewards but does not publish w: 0.1 is ours, small, because a wrong prediction of the
    right length also earns w. Raises ValueError for different shapes or another w.
    """
    match, length_reward = torch.as_tensor(match).detach().float(), torch.as_tensor(length_reward).detach().float()
    if match.shape != length_reward.shape:
        raise ValueError(
            f"length_reward must have the shape of match {list(match.shape)}, got {list(length_reward.shape)}"
        )
    if not 0 <= length_weight <= 1:
        raise ValueError(f"length_weight must be in [0, 1], got {length_weight}")
    return (1 - length_weight) * match + length_weight * length_reward
