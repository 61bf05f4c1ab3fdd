"""What every stage that trains on sampled responses shares: responses as branches in rows, GRPO's loss on their tokens,
and how far the sampler's probabilities are from the trainer's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rmt.config import GRPO, Rollout
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import Branch, TokenTree
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.objectives import LossOutput, grpo_loss
from nemo_rmt.stages.session import Session

MULT_PROB_ERROR = "rollout/token_mult_prob_error"


def response_branch(
    position: int, prompt: Sequence[int], response: Sequence[int], logprobs: Sequence[float], advantage: float
) -> Branch:
    """A response, trained on behind the part of its prompt that follows ``trunk[:position]``, of 1 token or more.

    logprobs: the sampler's, of the response's tokens.
    """
    asked = [0.0] * len(prompt)
    return Branch(
        position,
        [*prompt, *response],
        [*asked, *[1.0] * len(response)],
        {"advantages": advantage, "rollout_logprobs": [*asked, *logprobs]},
    )


def packed_responses(session: Session, trees: list[TokenTree]) -> tuple[TokenBatch, int]:
    """``Session.packed_batch`` of trees whose branches are responses: with what ``policy_loss`` needs, also where this
    rank has no response."""
    batch, size = session.packed_batch(trees)
    if batch.branch_ids is None:
        # All zeros, not None: the sampling temperature is the branches' alone.
        batch.branch_ids, batch.fork_columns = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens)
        for name in ("advantages", "rollout_logprobs"):
            batch.extras[name] = torch.zeros_like(batch.loss_mask)
    return batch, size


def policy_loss(
    scores: TokenScores,
    batch: TokenBatch,
    mask: Tensor,
    settings: GRPO,
    rollout: Rollout,
    response_ids: Tensor | None = None,
) -> LossOutput:
    """GRPO on the sampled tokens of a micro-batch, ``mask`` ``[batch, sequence]``.

    The micro-batch carries ``advantages`` and ``rollout_logprobs``, and ``old_logprobs`` and ``reference_logprobs``
    where the settings need them. It is left with ``logprob_error``, for ``Sampler.compare``.

    Metrics: ``rollout/logprob_error_mean``, the mean of |trainer's − sampler's log-probability|, nats, and
    ``rollout/token_mult_prob_error``, the mean of its exponential (NeMo RL's name): 1 where the two agree.
    """
    logprobs, extras = scores.logprobs, batch.extras
    old_logprobs = extras.get("old_logprobs", logprobs.detach())
    corrected = rollout.engine == "vllm" and rollout.importance_cap is not None
    output = grpo_loss(
        logprobs,
        old_logprobs,
        extras["advantages"],
        mask,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        normalize=settings.normalize,
        kl_coefficient=settings.kl_coefficient,
        reference_logprobs=extras.get("reference_logprobs"),
        response_ids=response_ids,
        rollout_logprobs=extras["rollout_logprobs"] if corrected else None,
        importance_cap=rollout.importance_cap if corrected else None,
    )
    count = mask.sum()
    output.metrics["rl/entropy"] = ((scores.entropy.detach() * mask).sum(), count)
    # Where nothing lags, both are of the same weights: any difference is an error of the sampler or the trainer.
    extras["logprob_error"] = (old_logprobs - extras["rollout_logprobs"]).abs() * mask
    output.metrics["rollout/logprob_error_mean"] = (extras["logprob_error"].sum(), count)
    output.metrics[MULT_PROB_ERROR] = ((extras["logprob_error"].exp() * mask).sum(), count)
    return output


def attach(batch: TokenBatch, name: str, scores: TokenScores | None) -> None:
    """Keep scored log-probabilities with the batch, on the stage that has them."""
    if scores is not None:
        batch.extras[name] = scores.logprobs
