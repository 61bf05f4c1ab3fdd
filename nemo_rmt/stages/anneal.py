"""Annealing: the learning rate decays to zero, every token weighted uniformly or by ReMiT (arXiv 2602.03075)."""

from __future__ import annotations

from nemo_rmt.config import ReMiT
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.objectives import LossOutput, ntp_loss, remit_metrics, remit_weights, standard_deviation
from nemo_rmt.stages.pretrain import CorpusBatches, next_token
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training


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


def run(session: Session) -> None:
    """Anneal from the given checkpoint. ReMiT needs the input ``reference``."""
    settings, recipe = session.settings, session.recipe
    start = session.require_input("checkpoint")
    weighted = settings.objective == "remit"
    # Annealing the same checkpoint again, in another iteration, sees the same rows in the same order.
    order = session.job.iteration if recipe.flywheel.start_from == "previous" else 0
    batches = CorpusBatches(session, "anneal", order)
    scorers = {}
    if weighted:
        scorers["reference_logprobs"] = session.frozen_model(session.require_input("reference"))
        if settings.remit.gap_model == "frozen":
            scorers["frozen_logprobs"] = session.frozen_model(start)
    objective = remit_objective(settings.remit) if weighted else next_token
    training = Training(session, start, with_optimizer=settings.resume_optimizer)
    for step in training.steps():
        batch = batches.batch(step)
        for name, model in scorers.items():
            scores = model.score(batch, settings.micro_batch_size)
            if scores is not None:  # the last pipeline stage, where the loss is
                batch.extras[name] = scores.logprobs
        metrics = training.model.train_step(batch.micro_batches(settings.micro_batch_size), objective)
        if weighted:
            metrics["remit/weight_std"] = standard_deviation(
                metrics["remit/weight_mean"], metrics.pop("remit/weight_square")
            )
        tokens = settings.global_batch_size * settings.sequence_length
        training.record(metrics, tokens=tokens, samples=lambda: batches.samples(step))
