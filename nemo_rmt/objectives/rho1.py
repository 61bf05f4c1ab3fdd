"""Rho-1: training on the tokens that the reference predicts much better than the model does (arXiv 2404.07965).

The paper selects within a batch; here within a row, so that what is selected depends neither on how many rows a
micro-batch has nor on the layout. Rows of a thousand tokens and more make it nearly the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rmt.objectives.output import masked, require_same_shape


def rho1_selection(reference_logprobs: Tensor, policy_logprobs: Tensor, mask: Tensor, *, keep: float = 0.6) -> Tensor:
    """1 for the share ``keep`` of each row's tokens with the largest excess loss, log p_ref - log p_θ (equation 3), 0
    elsewhere; detached float32 ``[batch, sequence]``.

    reference_logprobs, policy_logprobs: ``[batch, sequence]``, nats, of the target token.
    mask: ``[batch, sequence]``, 0/1; positions without it are neither counted nor selected.
    keep: in (0, 1]; of n tokens round(keep * n) are selected, at least one; of equal ones the first. 0.6 is the paper's
        choice for 1B parameters.

    The loss is next-token prediction with this selection as its mask: the mean over the selected tokens (equation 4).
    Raises ValueError for other shapes or ranges.
    """
    require_same_shape(reference_logprobs=reference_logprobs, policy_logprobs=policy_logprobs, mask=mask)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
    counted = mask.bool()
    excess = masked(reference_logprobs.detach().float() - policy_logprobs.detach().float(), mask)
    order = excess.masked_fill(~counted, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    count = counted.sum(-1, keepdim=True)
    return (counted & (rank < (keep * count).round().clamp_(min=1))).float()
