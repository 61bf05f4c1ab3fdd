"""What every stage that trains on sampled responses shares: GRPO's loss on their tokens, and the sampler's error."""

from __future__ import annotations

from torch import Tensor

from nemo_rmt.config import GRPO
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, max_over_data_parallel
from nemo_rmt.objectives import LossOutput, grpo_loss


def policy_loss(
    scores: TokenScores, batch: TokenBatch, mask: Tensor, settings: GRPO, response_ids: Tensor | None = None
) -> LossOutput:
    """GRPO on the sampled tokens of a micro-batch, ``mask`` ``[batch, sequence]``.

    The micro-batch carries ``advantages`` and ``rollout_logprobs``, and ``old_logprobs`` and ``reference_logprobs``
    where the settings need them. It is left with ``logprob_error``, for ``largest_error``.
    """
    logprobs, extras = scores.logprobs, batch.extras
    old_logprobs = extras.get("old_logprobs", logprobs.detach())
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
    )
    count = mask.sum()
    output.metrics["rl/entropy"] = ((scores.entropy.detach() * mask).sum(), count)
    # Both are the weights' that sampled: any difference is an error of the sampler or the trainer.
    extras["logprob_error"] = (old_logprobs - extras["rollout_logprobs"]).abs() * mask
    output.metrics["train/rollout_logprob_error"] = (extras["logprob_error"].sum(), count)
    return output


def attach(batch: TokenBatch, name: str, scores: TokenScores | None) -> None:
    """Keep scored log-probabilities with the batch, on the stage that has them."""
    if scores is not None:
        batch.extras[name] = scores.logprobs


def largest_error(micro_batches: list[TokenBatch]) -> float:
    """The largest difference of log-probabilities between sampler and trainer, which the last pipeline stage knows."""
    errors = [micro.extras["logprob_error"].max().item() for micro in micro_batches if "logprob_error" in micro.extras]
    return broadcast_from_last_stage(max_over_data_parallel(max(errors, default=0.0)))
