"""A new mid-training objective in one file: Rho-1's selective language modelling (arXiv 2404.07965).

Only tokens that the reference likes much more than the model does are trained on: the share ``KEEP`` of each
micro-batch with the largest gap. Needs a finished ReMiT anneal, whose data, checkpoint and RL reference it takes (make
demo leaves one):

    python examples/rho1.py runs/demo/iteration_001/anneal/stage.yaml runs/demo/iteration_001/rho1

Everything but the objective is the anneal's: rows and their order, schedule, layout, checkpoints, metrics.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.objectives import LossOutput, ntp_loss
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.pretrain import CorpusBatches
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training

KEEP = 0.6


def selected_tokens(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Next-token prediction on the tokens with the largest excess loss, averaged over these alone."""
    excess = batch.extras["reference_logprobs"] - scores.logprobs.detach()
    excess = excess.masked_fill(batch.loss_mask == 0, -torch.inf)
    count = max(1, round(KEEP * batch.loss_mask.sum().item()))
    selected = torch.zeros_like(batch.loss_mask)
    selected.view(-1)[excess.flatten().topk(count).indices] = 1
    output = ntp_loss(scores.logprobs, selected)
    output.metrics["rho1/selected"] = (selected.sum(), batch.loss_mask.sum())
    return output


def run(session: Session) -> None:
    """The anneal's loop with another objective."""
    settings = session.settings
    reference = session.frozen_model(session.require_input("reference"))
    batches = CorpusBatches(session, "anneal", 0)
    training = Training(session, session.require_input("checkpoint"), with_optimizer=True)
    for step in training.steps():
        batch = batches.batch(step)
        scores = reference.score(batch, settings.micro_batch_size)
        if scores is not None:  # the last pipeline stage, where the loss is
            batch.extras["reference_logprobs"] = scores.logprobs
        metrics = training.model.train_step(batch.micro_batches(settings.micro_batch_size), selected_tokens)
        tokens = settings.global_batch_size * settings.sequence_length
        training.record(metrics, tokens=tokens, samples=lambda: batches.samples(step))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    job, folder = StageJob.load(Path(sys.argv[1])), Path(sys.argv[2]).absolute()
    job.save(folder / "stage.yaml")  # what this run was made from
    with distributed(job.recipe.parallel, job.recipe.seed) as layout:
        run(Session(job, folder, layout))


if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    main()
