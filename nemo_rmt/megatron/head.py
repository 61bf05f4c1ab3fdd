"""From hidden states to log-probabilities, without ever holding ``[sequence, vocabulary]`` logits.

Tokens are taken in chunks; each chunk's logits live only until its log-probabilities are known, and are computed
again in backward. The vocabulary may be sharded over tensor-parallel ranks. Every training objective sees what this
returns, never logits.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor

from nemo_rmt.config import LOGITS_AT_ONCE

MAX_INT32 = 2**31 - 1


class TokenScores(NamedTuple):
    """What the head returns, each ``[batch, sequence]``, float32, natural logarithms; None what was not asked for."""

    logprobs: Tensor
    """Log-probability of the label under the model at its temperature."""
    entropy: Tensor
    """Entropy of the predictive distribution in nats; zeros when not asked for."""
    hits: Tensor
    """1 where the label is the most probable token, else 0. Carries no gradient."""
    divergence: Tensor | None = None
    """KL divergence of a teacher's distribution from the model's, in nats."""
    top_tokens: Tensor | None = None
    """int64 ``[batch, sequence, K]``: the likeliest tokens, the likeliest first, of equally likely ones the first."""
    top_logprobs: Tensor | None = None
    """``[batch, sequence, K]``: their log-probabilities. Carries no gradient."""


class Shard(NamedTuple):
    """One tensor-parallel rank's part of the vocabulary. Tensors ``[tokens, columns]`` have its columns only."""

    start: int
    """Its first token."""
    rows: int
    """Rows of the output embedding that this rank holds, padding included."""
    vocab_size: int
    """Tokens of the whole vocabulary, without padding."""
    group: dist.ProcessGroup
    """The ranks that hold the whole."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, logits: Tensor) -> Tensor:
        """``[tokens]``, each token's largest logit over all ranks."""
        # Padding may be all that a rank has.
        own = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:1], -torch.inf)
        return self._reduce(own, dist.ReduceOp.MAX)

    def at(self, values: Tensor, tokens: Tensor) -> Tensor:
        """This rank's values at ``[tokens, K]`` token ids, 0 where another rank has them."""
        if not values.shape[1]:
            return values.new_zeros(tokens.shape)
        columns, own = self._columns(values, tokens)
        return values.gather(1, columns).where(own, 0.0)

    def add_at(self, values: Tensor, tokens: Tensor, added: Tensor | float) -> Tensor:
        """Add to this rank's values at ``[tokens, K]`` token ids, in place."""
        if values.shape[1]:
            columns, own = self._columns(values, tokens)
            values.scatter_add_(1, columns, torch.where(own, added, 0.0))
        return values

    def _columns(self, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where token ids stand among this rank's columns, and whether they do.

        A column for every id, not the indices of those that have one: their number would have to come from the GPU.
        """
        local, width = tokens - self.start, values.shape[1]
        return local.clamp(0, width - 1), (local >= 0) & (local < width)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(values, operation, group=self.group)
        return values


class Teacher(Protocol):
    """Another distribution over the vocabulary for every token, for distillation.

    ``part`` says which of the tokens are meant. What a method is given as its own may be overwritten.
    """

    def divergence(self, part: slice, shifted: Tensor, log_sum: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        """``[tokens]`` nats: the KL divergence of this distribution from the model's; and ``[tokens]`` for ``target``.

        shifted: ``[tokens, columns]``, its own, the model's logits less the largest of each token. log_sum:
        ``[tokens]``, the logarithm of the sum of their exponentials over the whole vocabulary.
        """

    def target(self, part: slice, log_softmax: Tensor, kept: Tensor, shard: Shard) -> Tensor:
        """``[tokens, columns]``: the probabilities less which the model's are the divergence's gradient in the logits.

        log_softmax: ``[tokens, columns]``, its own, of the model. kept: what ``divergence`` gave.
        """


class _Settings(NamedTuple):
    """What the autograd function is told beside its tensors."""

    temperature: float | Tensor
    chunk: int
    with_entropy: bool
    teacher: Teacher | None
    top_k: int
    shard: Shard


class _ChunkedLogprob(torch.autograd.Function):
    """Vocabulary-parallel log-softmax gathered at the labels, logits recomputed in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, settings: _Settings):
        temperature, chunk, with_entropy, teacher, top_k, shard = settings
        size, empty = labels.numel(), {"dtype": torch.float32, "device": hidden.device}
        logprobs, entropy, hits, normaliser = (torch.zeros(size, **empty) for _ in range(4))
        divergence, kept = (None, None) if teacher is None else (torch.zeros(size, **empty) for _ in range(2))
        top_tokens = labels.new_zeros(size, top_k) if top_k else None
        top_logprobs = torch.zeros(size, top_k, **empty) if top_k else None
        for start in range(0, size, chunk):
            part = slice(start, start + chunk)
            logits = logits_of(hidden[part], weight, _at(temperature, part))
            largest = shard.largest(logits)
            target = shard.at(logits, labels[part, None])[:, 0]
            if top_k:
                top_tokens[part], top_logprobs[part] = likeliest(logits, top_k, shard)
            shifted = logits.sub_(largest[:, None])
            exponentials = shifted.exp_() if teacher is None and not with_entropy else shifted.exp()
            sums = [exponentials.sum(-1), target]
            if with_entropy:
                sums.append(torch.linalg.vecdot(exponentials, shifted))
            sums = shard.sum(torch.stack(sums))
            log_sum = sums[0].log()
            normaliser[part] = largest + log_sum
            logprobs[part] = sums[1] - normaliser[part]
            hits[part] = (sums[1] >= largest).float()
            if with_entropy:
                entropy[part] = log_sum - sums[2] / sums[0]
            if top_k:
                top_logprobs[part] -= normaliser[part, None]
            if teacher is not None:
                del exponentials
                divergence[part], kept[part] = teacher.divergence(part, shifted, log_sum, shard)
        ctx.save_for_backward(hidden, weight, labels, normaliser, entropy, kept)
        ctx.settings = settings
        ctx.mark_non_differentiable(hits, *([top_tokens, top_logprobs] if top_k else []))
        return logprobs, entropy, hits, divergence, top_tokens, top_logprobs

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _, grad_divergence, *__):
        hidden, weight, labels, normaliser, entropy, kept = ctx.saved_tensors
        temperature, chunk, with_entropy, teacher, _, shard = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            log_softmax = logits_of(hidden[part], weight, _at(temperature, part)).sub_(normaliser[part, None])
            probabilities = log_softmax.exp()
            factor = -grad_logprobs[part, None]
            if with_entropy:
                factor = factor - grad_entropy[part, None] * (log_softmax + entropy[part, None])
            if teacher is not None:
                factor = factor + grad_divergence[part, None]
            grad = probabilities.mul_(factor)
            shard.add_at(grad, labels[part, None], grad_logprobs[part, None])
            if teacher is not None:
                target = teacher.target(part, log_softmax, kept[part], shard)
                grad.addcmul_(target, grad_divergence[part, None], value=-1)
            grad = grad.div_(_at(temperature, part)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                _accumulate(grad_weight, grad, hidden[part])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _at(temperature: float | Tensor, part: slice) -> float | Tensor:
    """The temperature of some of the tokens: ``[tokens, 1]`` where it is not the same for all."""
    return temperature[part, None] if isinstance(temperature, Tensor) else temperature


def logits_of(hidden: Tensor, weight: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """``[tokens, columns]`` float32 logits at a temperature."""
    logits = (hidden @ weight.t()).float()
    return logits if isinstance(temperature, float) and temperature == 1.0 else logits.div_(temperature)


def _accumulate(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add one chunk's weight gradient in float32; in place, without a second ``[vocabulary, hidden]``, in fp32."""
    if hidden.dtype == torch.float32:
        grad_weight.addmm_(grad_logits.t(), hidden)
    else:
        grad_weight.add_(grad_logits.t() @ hidden)


def likeliest(logits: Tensor, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Of each token the ``count`` largest logits of the whole vocabulary, the largest first: tokens and logits.

    Equal logits, of which bfloat16 has many, come in the order of the tokens, at every layout.
    """
    # One integer for both: a logit's bits, made to order like the number, above how far the token is from the last.
    bits, tokens = logits.view(torch.int32), torch.arange(logits.shape[1], device=logits.device) + shard.start
    keys = _ordered(bits).long() * 2**32 + (MAX_INT32 - tokens)
    keys = keys.topk(min(count, keys.shape[1])).values
    if shard.group.size() > 1:
        keys = torch.nn.functional.pad(keys, (0, count - keys.shape[1]), value=torch.iinfo(torch.int64).min)
        parts = [torch.empty_like(keys) for _ in range(shard.group.size())]
        dist.all_gather(parts, keys, group=shard.group)
        keys = torch.cat(parts, 1).topk(count).values
    return MAX_INT32 - keys % 2**32, _ordered((keys >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """int32 that order as the float32 of these bits do; and those bits of such int32."""
    return bits ^ ((bits >> 31) & MAX_INT32)


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
    teacher: Teacher | None = None,
    top_k: int = 0,
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
        teacher: also compute its divergence (two more buffers). Its tokens are in the order of ``hidden``'s.
        top_k: also find as many of the likeliest tokens, at most ``vocab_size`` (two more buffers).
        chunk: tokens at once; None bounds a chunk's logits to 128 MiB.
        sequence_parallel: whether ``hidden`` is split along the sequence.

    Returns:
        TokenScores; ``logprobs``, ``entropy`` and ``divergence`` are differentiable in ``hidden`` and ``weight``.
    """
    group = get_tensor_model_parallel_group()
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    start, end = VocabUtility.vocab_range_from_per_partition_vocab_size(weight.shape[0], group.rank(), group.size())
    shard = Shard(start, weight.shape[0], vocab_size, group)
    # From the padded shard: ranks that took chunks of different sizes would reduce tensors of different shapes.
    chunk = chunk or max(1, LOGITS_AT_ONCE // weight.shape[0])
    weight = weight[: max(0, min(end, vocab_size) - start)]
    sequence, batch, width = hidden.shape
    tokens, targets = hidden.reshape(sequence * batch, width), labels.t().reshape(-1)
    temperature = temperature.t().reshape(-1) if isinstance(temperature, Tensor) else temperature
    settings = _Settings(temperature, chunk, with_entropy, teacher, top_k, shard)
    outputs = _ChunkedLogprob.apply(tokens, weight, targets, settings)
    return TokenScores(*(None if o is None else o.unflatten(0, (sequence, batch)).transpose(0, 1) for o in outputs))
