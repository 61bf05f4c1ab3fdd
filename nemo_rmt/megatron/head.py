"""From hidden states to log-probabilities, without ever holding ``[sequence, vocabulary]`` logits.

Tokens are taken in chunks; each chunk's logits live only until its log-probabilities are known, and are computed
again in backward. The vocabulary may be sharded over tensor-parallel ranks. Every training objective sees what this
returns, never logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor

from nemo_rmt.config import LOGITS_AT_ONCE


class TokenScores(NamedTuple):
    """What the head returns, each ``[batch, sequence]``, float32, natural logarithms."""

    logprobs: Tensor
    """Log-probability of the label under the model at its temperature."""
    entropy: Tensor
    """Entropy of the predictive distribution in nats; zeros when not asked for."""
    hits: Tensor
    """1 where the label is the most probable token, else 0. Carries no gradient."""


class _ChunkedLogprob(torch.autograd.Function):
    """Vocabulary-parallel log-softmax gathered at the labels, logits recomputed in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, chunk, with_entropy, group, vocab_start):
        size = labels.numel()
        logprobs, entropy, hits, normaliser = (hidden.new_zeros(size, dtype=torch.float32) for _ in range(4))
        for start in range(0, size, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, _at(temperature, part))
            largest = _largest(logits)
            _all_reduce(largest, dist.ReduceOp.MAX, group)
            target = _at_labels(logits, labels[part], vocab_start)
            shifted = logits.sub_(largest[:, None])
            exponentials = shifted.exp() if with_entropy else shifted.exp_()
            sums = [exponentials.sum(-1), target]
            if with_entropy:
                sums.append(torch.linalg.vecdot(exponentials, shifted))
            sums = torch.stack(sums)
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            log_sum = sums[0].log()
            normaliser[part] = largest + log_sum
            logprobs[part] = sums[1] - normaliser[part]
            hits[part] = (sums[1] >= largest).float()
            if with_entropy:
                entropy[part] = log_sum - sums[2] / sums[0]
        ctx.save_for_backward(hidden, weight, labels, normaliser, entropy)
        ctx.settings = (temperature, chunk, with_entropy, vocab_start)
        ctx.mark_non_differentiable(hits)
        return logprobs, entropy, hits

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _):
        hidden, weight, labels, normaliser, entropy = ctx.saved_tensors
        temperature, chunk, with_entropy, vocab_start = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            log_softmax = _logits(hidden[part], weight, _at(temperature, part)).sub_(normaliser[part, None])
            probabilities = log_softmax.exp()
            factor = -grad_logprobs[part, None]
            if with_entropy:
                factor = factor - grad_entropy[part, None] * (log_softmax + entropy[part, None])
            grad = probabilities.mul_(factor)
            _add_at_labels(grad, labels[part], vocab_start, grad_logprobs[part])
            grad = grad.div_(_at(temperature, part)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                _accumulate(grad_weight, grad, hidden[part])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _largest(logits: Tensor) -> Tensor:
    """Each token's largest logit of this shard; -inf for a shard of nothing but padding."""
    return logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:1], -torch.inf)


def _all_reduce(values: Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup) -> None:
    """Over the ranks of the vocabulary, where it is sharded."""
    if group.size() > 1:
        dist.all_reduce(values, operation, group=group)


def _at(temperature: float | Tensor, part: slice) -> float | Tensor:
    """The temperature of some of the tokens: ``[tokens, 1]`` where it is not the same for all."""
    return temperature[part, None] if isinstance(temperature, Tensor) else temperature


def _logits(hidden: Tensor, weight: Tensor, temperature: float | Tensor) -> Tensor:
    """``[tokens, local vocabulary]`` float32 logits at a temperature."""
    logits = (hidden @ weight.t()).float()
    return logits if isinstance(temperature, float) and temperature == 1.0 else logits.div_(temperature)


def _accumulate(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add one chunk's weight gradient in float32; in place, without a second ``[vocabulary, hidden]``, in fp32."""
    if hidden.dtype == torch.float32:
        grad_weight.addmm_(grad_logits.t(), hidden)
    else:
        grad_weight.add_(grad_logits.t() @ hidden)


def _columns(labels: Tensor, width: int, vocab_start: int) -> tuple[Tensor, Tensor]:
    """Where the labels stand in this rank's shard of ``width`` columns, and whether they do: ``[tokens, 1]`` each.

    A column for every token, not the indices of those that have one: their number would have to come from the GPU.
    """
    local = (labels - vocab_start)[:, None]
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _at_labels(logits: Tensor, labels: Tensor, vocab_start: int) -> Tensor:
    """``[tokens]``, the labels' logits in this rank's shard, 0 elsewhere."""
    if not logits.shape[1]:
        return logits.new_zeros(labels.shape)
    columns, own = _columns(labels, logits.shape[1], vocab_start)
    return logits.gather(1, columns).where(own, 0.0)[:, 0]


def _add_at_labels(grad: Tensor, labels: Tensor, vocab_start: int, values: Tensor) -> None:
    """Add ``[tokens]`` values to the labels' entries of this rank's shard, in place."""
    if grad.shape[1]:
        columns, own = _columns(labels, grad.shape[1], vocab_start)
        grad.scatter_add_(1, columns, values[:, None].where(own, 0.0))


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
    chunk: int | None = None,
    sequence_parallel: bool = False,
) -> TokenScores:
    """Score every label under the model.

    Args:
        hidden: ``[sequence, batch, hidden]`` after the final norm; with sequence parallelism this rank's part of the
            sequence.
        weight: ``[padded vocabulary / tensor-parallel size, hidden]`` output embedding, this rank's shard.
        labels: ``[batch, sequence]`` token ids of the whole sequence.
        vocab_size: true vocabulary; padding rows get no probability, so that the result does not depend on padding.
        temperature: divides the logits, one for all or ``[batch, sequence]``; use the sampling temperature to score
            sampled tokens. Carries no gradient.
        with_entropy: also compute the entropy (one more buffer of a chunk's logits).
        chunk: tokens at once; None bounds a chunk's logits to 128 MiB.
        sequence_parallel: whether ``hidden`` is split along the sequence.

    Returns:
        TokenScores; ``logprobs`` and ``entropy`` are differentiable in ``hidden`` and ``weight``.
    """
    group = get_tensor_model_parallel_group()
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    start, end = VocabUtility.vocab_range_from_per_partition_vocab_size(weight.shape[0], group.rank(), group.size())
    # From the padded shard: ranks that took chunks of different sizes would reduce tensors of different shapes.
    chunk = chunk or max(1, LOGITS_AT_ONCE // weight.shape[0])
    weight = weight[: max(0, min(end, vocab_size) - start)]
    sequence, batch, width = hidden.shape
    tokens, targets = hidden.reshape(sequence * batch, width), labels.t().reshape(-1)
    temperature = temperature.t().reshape(-1) if isinstance(temperature, Tensor) else temperature
    outputs = _ChunkedLogprob.apply(tokens, weight, targets, temperature, chunk, with_entropy, group, start)
    return TokenScores(*(output.view(sequence, batch).t() for output in outputs))
