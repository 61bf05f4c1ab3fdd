"""Teachers for distillation: what the head compares the model's distribution with, chunk by chunk.

The divergence is KL(teacher ‖ model) = Σ p (log p − log q). Its gradient in the model's logits is q − p. A teacher's
distribution is at temperature 1, and carries no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rmt.megatron.head import Shard, Teacher, logits_of


class HiddenTeacher:
    """A teacher's whole distribution, of which no more exists at once than of the model's.

    Args:
        hidden: ``[tokens, hidden]`` after the teacher's final norm; the teacher may be of another width.
        weight: ``[padded vocabulary / tensor-parallel size, hidden]`` its output embedding, this rank's shard.
    """

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.hidden = hidden
        self.weight = weight

    def divergence(self, part: slice, shifted: Tensor, log_sum: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        """See Teacher; keeps the logarithm of the teacher's softmax denominator."""
        if self.weight.shape[0] != shard.rows:
            raise ValueError(f"the teacher has {self.weight.shape[0]} rows of vocabulary here, the model {shard.rows}")
        logits = self._logits(part, shifted.shape[1])
        largest = shard.largest(logits)
        logits.sub_(largest[:, None])
        exponentials = logits.exp()
        # Of logits less their largest: the difference of the plain ones' logarithms would lose digits.
        total, product = shard.sum(
            torch.stack([exponentials.sum(-1), torch.linalg.vecdot(exponentials, logits.sub_(shifted))])
        )
        return product / total - total.log() + log_sum, largest + total.log()

    def target(self, part: slice, log_softmax: Tensor, kept: Tensor, shard: Shard) -> Tensor:
        """See Teacher."""
        return self._logits(part, log_softmax.shape[1]).sub_(kept[:, None]).exp_()

    def _logits(self, part: slice, columns: int) -> Tensor:
        """Over this rank's vocabulary without its padding, as the model's."""
        return logits_of(self.hidden[part], self.weight[:columns])


class LikeliestTokens:
    """A teacher of which only the likeliest tokens are known: all the others count as one.

    Of all distributions with these tokens' probabilities, the divergence is that of the one nearest to the model: at
    most the true divergence, and equal to it once every token is given.

    Args:
        tokens: int64 ``[tokens, K]``, those of a row distinct.
        logprobs: ``[tokens, K]``, finite. Rounding may bring their sum above 1; they are scaled back then.
    """

    def __init__(self, tokens: Tensor, logprobs: Tensor):
        self.tokens = tokens
        self.logprobs = logprobs

    def divergence(self, part: slice, shifted: Tensor, log_sum: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        """See Teacher; keeps the model's log-probability of all the other tokens together."""
        tokens, count = self.tokens[part], self.tokens.shape[1]
        found = shard.at(shifted, tokens)
        # Summed over the others themselves: 1 less the sum over these tokens has no digits left where it is near 0.
        others = shard.add_at(shifted, tokens, -torch.inf).exp_().sum(-1)
        found, others = shard.sum(torch.cat([found, others[:, None]], 1)).split([count, 1], 1)
        others = others.clamp(min=torch.finfo(others.dtype).tiny).log()  # which they may all be too small for
        log_q = torch.cat([found, others], 1) - log_sum[:, None]
        p = self._probabilities(part, shard)
        return (torch.xlogy(p, p) - p * log_q).sum(-1), log_q[:, -1]

    def target(self, part: slice, log_softmax: Tensor, kept: Tensor, shard: Shard) -> Tensor:
        """See Teacher: the rest of the probability is divided as the model divides it."""
        tokens, p = self.tokens[part], self._probabilities(part, shard)
        others = shard.add_at(log_softmax.sub_(kept[:, None]), tokens, -torch.inf).exp_().mul_(p[:, -1:])
        return shard.add_at(others, tokens, p[:, :-1])

    def _probabilities(self, part: slice, shard: Shard) -> Tensor:
        """``[tokens, K + 1]``, the last for all other tokens; they add up to 1."""
        known = self.logprobs[part].float().exp()
        rest = (1 - known.sum(-1, keepdim=True)).clamp(min=0)
        if known.shape[1] == shard.vocab_size:
            rest.zero_()  # nothing is left to have it
        together = torch.cat([known, rest], 1)
        return together / together.sum(-1, keepdim=True)


def teacher_of(extras: dict[str, Tensor], weight: Tensor | None) -> Teacher | None:
    """The teacher that travels with a micro-batch, None without one.

    Args:
        extras: ``teacher_hidden`` ``[rows, sequence, hidden]``; or ``teacher_tokens`` and ``teacher_logprobs``
            ``[rows, sequence, K]``, see LikeliestTokens.
        weight: the output embedding for ``teacher_hidden``, see HiddenTeacher. ValueError where it is missing.
    """
    if "teacher_hidden" in extras:
        if weight is None:
            raise ValueError("teacher_hidden needs the teacher's output embedding, teacher_weight, beside it")
        return HiddenTeacher(_in_the_heads_order(extras["teacher_hidden"]), weight)
    if "teacher_tokens" in extras:
        return LikeliestTokens(*(_in_the_heads_order(extras[f"teacher_{name}"]) for name in ("tokens", "logprobs")))
    return None


def _in_the_heads_order(values: Tensor) -> Tensor:
    """``[rows, sequence, ...]`` to ``[tokens, ...]``: the head has the rows of a position together."""
    return values.transpose(0, 1).flatten(0, 1)
