"""Annealing: the learning rate decays to zero on next-token prediction, plain or guided by a reference model.

Uniform; weighted by ReMiT (arXiv 2602.03075); on the tokens that Rho-1 selects (arXiv 2404.07965); or distilled.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo_rmt.config import CachedReference, Distill, ReMiT, Rho1
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.train_step import Objective
from nemo_rmt.objectives import (
    LossOutput,
    distill_loss,
    ntp_loss,
    remit_metrics,
    remit_weights,
    rho1_selection,
    standard_deviation,
)
from nemo_rmt.objectives.output import mean_metric
from nemo_rmt.stages import references
from nemo_rmt.stages.pretrain import CorpusBatches, next_token
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.shown_weights import ShownWeights
from nemo_rmt.stages.training import Training

Weights = Callable[[TokenScores, TokenBatch], Tensor]
"""The weight of every label, ``[rows, sequence]``, from the policy's scores and the reference's in the extras."""


def remit(settings: ReMiT) -> tuple[Objective, Weights]:
    """Next-token prediction weighted by how much more the RL reference likes each token.

    Micro-batches carry ``reference_logprobs``, and ``frozen_logprobs`` when the gap is against the frozen start.
    """

    def policy(scores: TokenScores, batch: TokenBatch) -> Tensor:
        return batch.extras.get("frozen_logprobs", scores.logprobs.detach())

    def weights(scores: TokenScores, batch: TokenBatch) -> Tensor:
        return remit_weights(
            batch.extras["reference_logprobs"],
            policy(scores, batch),
            batch.loss_mask,
            epsilon=settings.epsilon,
            scale=settings.scale,
            segment_ids=batch.segment_ids if settings.centring == "document" else None,
            centred=settings.centring != "none",
        )

    def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
        weighed = weights(scores, batch)
        output = ntp_loss(scores.logprobs, batch.loss_mask, weighed)
        gap = batch.extras["reference_logprobs"] - policy(scores, batch)
        found = remit_metrics(weighed, gap, batch.loss_mask, settings.epsilon)
        if "reference_hits" in batch.extras:
            same = (batch.extras["reference_hits"] == scores.hits).float()
            found["agreement"] = mean_metric(same, batch.loss_mask)
        output.metrics.update({f"remit/{name}": metric for name, metric in found.items()})
        return output

    return objective, weights


def rho1(settings: Rho1) -> tuple[Objective, Weights]:
    """Next-token prediction on the tokens with the largest excess loss, averaged over these alone.

    Micro-batches carry ``reference_logprobs``.
    """

    def selection(scores: TokenScores, batch: TokenBatch) -> Tensor:
        reference = batch.extras["reference_logprobs"]
        return rho1_selection(reference, scores.logprobs, batch.loss_mask, keep=settings.keep)

    def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
        selected = selection(scores, batch)
        output = ntp_loss(scores.logprobs, selected)
        metrics = {
            "loss": mean_metric(-scores.logprobs, batch.loss_mask),
            "rho1/selected_loss": output.metrics["loss"],
            "rho1/selected": mean_metric(selected, batch.loss_mask),
        }
        return LossOutput(output.loss_sum, output.num_tokens, metrics)

    return objective, selection


def distill(settings: Distill) -> Objective:
    """The reference's distribution as the target. Micro-batches carry what the model's head needs of it."""

    def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
        return distill_loss(scores.logprobs, scores.divergence, batch.loss_mask, coefficient=settings.coefficient)

    return objective


def run(session: Session) -> None:
    """Anneal from the given checkpoint. Objectives but uniform need the input ``reference``, or ``cache``."""
    settings, recipe = session.settings, session.recipe
    start = session.require_input("checkpoint")
    # Annealing the same checkpoint again, in another iteration, sees the same rows in the same order.
    order = session.job.iteration if recipe.flywheel.start_from == "previous" else 0
    batches = CorpusBatches(session, "anneal", order)
    guides, teacher_weight = _guides(session, batches)
    objective, weights = next_token, None
    if settings.objective == "remit":
        objective, weights = remit(settings.remit)
    elif settings.objective == "rho1":
        objective, weights = rho1(settings.rho1)
    elif settings.objective == "distill":
        objective = distill(settings.distill)
    training = Training(session, start, with_optimizer=settings.resume_optimizer)
    shown = None if weights is None else ShownWeights(session, training, weights)
    for step in training.steps():
        batch = batches.batch(step)
        for extras in guides:
            batch.extras |= extras(step, batch)
        if shown is not None and step in (0, settings.steps - 1):
            shown.write(step, batch, batches.samples(step))
        metrics = training.model.train_step(
            batch.micro_batches(settings.micro_batch_size), objective, teacher_weight=teacher_weight
        )
        if "remit/weight_square" in metrics:
            square = metrics.pop("remit/weight_square")
            metrics["remit/weight_std"] = standard_deviation(metrics["remit/weight_mean"], square)
        tokens = settings.global_batch_size * settings.sequence_length
        training.record(metrics, tokens=tokens, samples=lambda: batches.samples(step))


def _guides(session: Session, batches: CorpusBatches) -> tuple[list[references.Extras], Tensor | None]:
    """What travels with every batch, and with a teacher in memory its output weight."""
    settings = session.settings
    if settings.guide is None:
        return [], None
    reference = settings.guide.reference
    if settings.objective == "distill":
        if isinstance(reference, CachedReference):
            return [references.cached_distribution(session, batches, reference)], None
        states, weight = references.hidden_states(session, session.require_input("reference"))
        return [states], weight
    if isinstance(reference, CachedReference):
        guides = [references.cached_logprobs(session, batches, reference)]
    else:
        guides = [references.logprobs(session, session.require_input("reference"), hits=True)]
    if settings.objective == "remit" and settings.remit.gap_model == "frozen":
        guides.append(references.logprobs(session, session.require_input("checkpoint"), hits=False))
    return guides, None
