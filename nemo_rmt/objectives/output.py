"""What every loss returns, and the (sum, count) pairs its metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Metric = tuple[Tensor, Tensor]
"""(sum, count): the metric's value is sum / count after both were added over micro-batches and ranks."""


@dataclass(frozen=True)
class LossOutput:
    """A loss before normalisation. Add it over micro-batches and data-parallel ranks, then divide.

    loss_sum: 0-d float32, with gradient; the step's loss is its total over the total of num_tokens.
    num_tokens: 0-d int64; the denominator, an integer because Megatron's schedules keep it in an int tensor.
        It never contains token weights.
    metrics: name -> (sum, count), both detached; sum is 0-d (1-d for a histogram) float32, count 0-d float32.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` in float32 where ``mask`` is nonzero, 0 elsewhere; both ``[batch, sequence]``.

    A product with the mask would turn an infinite value at a padded position into NaN, here and in backward.
    """
    values = values.float()
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def mean_metric(values: Tensor, mask: Tensor) -> Metric:
    """The masked mean of ``values`` as a detached (sum, count) pair; both arguments ``[batch, sequence]``."""
    return masked(values.detach(), mask).sum(), mask.bool().sum().float()


def require_same_shape(**tensors: Tensor | None) -> None:
    """Refuse tensors (None is skipped) that are not all ``[batch, sequence]`` of one shape.

    Broadcasting would otherwise turn a ``[batch]`` tensor into a silently wrong loss.
    """
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    first, shape = next(iter(given.items()))
    if len(shape) != 2:
        raise ValueError(f"{first} must be [batch, sequence], got shape {list(shape)}")
    for name, other in given.items():
        if other != shape:
            raise ValueError(f"{name} must have the shape of {first} {list(shape)}, got {list(other)}")
