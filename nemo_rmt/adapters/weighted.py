"""ReMiT's weighted loss as trainers built on Megatron-Core need it: from token losses, at any context parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rmt.objectives import LossOutput, ntp_loss, remit_metrics, remit_weights


def weighted_token_loss(
    token_losses: Tensor,
    reference_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    epsilon: float,
    scale: float,
    segment_ids: Tensor | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """Next-token prediction with ReMiT's weights, over this rank's part of the sequences.

    token_losses: ``[batch, sequence]``, −log p_θ of the target token in nats, with gradient: what a Megatron GPTModel
        returns when it is given labels.
    reference_logprobs: ``[batch, sequence]``, nats, of the same tokens under the RL reference.
    loss_mask: ``[batch, sequence]``, 0/1. It is read, never changed: Megatron takes its sum for the number of tokens.
    segment_ids: ``[batch, sequence]`` integers naming the document of each token; None centres within each row.
    context_parallel_group: the ranks that hold the other parts of the same rows. The gap is centred over all of them.

    ``num_tokens`` counts this rank's tokens: the trainers add it up themselves. Metrics: ntp_loss's, and
    remit_metrics' as ``remit/<name>``. Raises ValueError for other shapes or ranges.
    """
    logprobs = -token_losses
    parts, size, rank = (reference_logprobs.detach(), logprobs.detach(), loss_mask, segment_ids), 1, 0
    if context_parallel_group is not None and context_parallel_group.size() > 1:
        # Every rank computes the weights of the whole rows and keeps its own: a few numbers a token are gathered,
        # which is nothing beside the activations. In which order the parts lie makes no difference to a mean.
        size, rank = context_parallel_group.size(), context_parallel_group.rank()
        parts = tuple(None if part is None else _gathered(part, context_parallel_group) for part in parts)
    reference, policy, mask, segments = parts
    weights = remit_weights(reference, policy, mask, epsilon=epsilon, scale=scale, segment_ids=segments)
    weights = weights.chunk(size, dim=-1)[rank]
    output = ntp_loss(logprobs, loss_mask, weights)
    metrics = remit_metrics(weights, reference_logprobs - logprobs.detach(), loss_mask, epsilon)
    output.metrics.update({f"remit/{name}": metric for name, metric in metrics.items()})
    return output


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[batch, group size · sequence]`` from each rank's ``[batch, sequence]``."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
