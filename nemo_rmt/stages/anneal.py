"""Annealing: the learning rate decays to zero, every token weighted uniformly or by ReMiT (arXiv 2602.03075)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nemo_rmt.config import CachedReference, ReMiT
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.objectives import LossOutput, ntp_loss, remit_metrics, remit_weights, standard_deviation
from nemo_rmt.profiling import part
from nemo_rmt.reference_cache import open_reference, require_fitting
from nemo_rmt.stages.pretrain import CorpusBatches, next_token
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training

Logprobs = Callable[[int, TokenBatch], Tensor | None]
"""A frozen model's log-probabilities of a step's labels, ``[rows, sequence]``, from the step and its batch; None where
the loss is not computed."""


def remit_objective(settings: ReMiT):
    """Next-token prediction weighted by how much more the RL reference likes each token.

    Micro-batches carry ``reference_logprobs``, and ``frozen_logprobs`` when the gap is against the frozen start.
    """

    def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
        reference = batch.extras["reference_logprobs"]
        policy = batch.extras.get("frozen_logprobs", scores.logprobs.detach())
        weights = remit_weights(
            reference,
            policy,
            batch.loss_mask,
            epsilon=settings.epsilon,
            scale=settings.scale,
            segment_ids=batch.segment_ids,
        )
        output = ntp_loss(scores.logprobs, batch.loss_mask, weights)
        remit = remit_metrics(weights, reference - policy, batch.loss_mask, settings.epsilon)
        output.metrics.update({f"remit/{name}": metric for name, metric in remit.items()})
        return output

    return objective


def online(session: Session, checkpoint: Path) -> Logprobs:
    """A checkpoint's log-probabilities, from a forward pass over every batch."""
    settings = session.settings
    model = session.frozen_model(checkpoint, offload=settings.remit.offload)

    def logprobs(step: int, batch: TokenBatch) -> Tensor | None:
        scores = model.score(batch, settings.micro_batch_size)
        return None if scores is None else scores.logprobs

    return logprobs


def cached(session: Session, batches: CorpusBatches, reference: CachedReference) -> Logprobs:
    """What ``nemo-rmt data score`` left. Raises UserError when it is not of this run's data."""
    cache = open_reference(session.recipe, session.require_input("cache"))
    require_fitting(cache, session.recipe, reference, session.data_folder)
    layout = session.layout

    def logprobs(step: int, batch: TokenBatch) -> Tensor | None:
        if layout.pipeline_rank < layout.pipeline_size - 1:
            return None
        with part("data"):
            labels = torch.from_numpy(cache.logprobs(batches.stretches(step))[:, 1:]).to(layout.device)
            # A document's first token has no number, and no weight. Any other without one would make the loss NaN.
            return torch.where(batch.loss_mask > 0, labels, 0.0)

    return logprobs


def run(session: Session) -> None:
    """Anneal from the given checkpoint. ReMiT needs the input ``reference``, or ``cache``."""
    settings, recipe = session.settings, session.recipe
    start = session.require_input("checkpoint")
    weighted = settings.objective == "remit"
    # Annealing the same checkpoint again, in another iteration, sees the same rows in the same order.
    order = session.job.iteration if recipe.flywheel.start_from == "previous" else 0
    batches = CorpusBatches(session, "anneal", order)
    frozen: dict[str, Logprobs] = {}
    if weighted:
        reference = settings.remit.reference
        if isinstance(reference, CachedReference):
            frozen["reference_logprobs"] = cached(session, batches, reference)
        else:
            frozen["reference_logprobs"] = online(session, session.require_input("reference"))
        if settings.remit.gap_model == "frozen":
            frozen["frozen_logprobs"] = online(session, start)
    objective = remit_objective(settings.remit) if weighted else next_token
    training = Training(session, start, with_optimizer=settings.resume_optimizer)
    for step in training.steps():
        batch = batches.batch(step)
        for name, logprobs in frozen.items():
            if (found := logprobs(step, batch)) is not None:
                batch.extras[name] = found
        metrics = training.model.train_step(batch.micro_batches(settings.micro_batch_size), objective)
        if weighted:
            metrics["remit/weight_std"] = standard_deviation(
                metrics["remit/weight_mean"], metrics.pop("remit/weight_square")
            )
        tokens = settings.global_batch_size * settings.sequence_length
        training.record(metrics, tokens=tokens, samples=lambda: batches.samples(step))
