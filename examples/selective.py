"""A new mid-training objective in one file: training on what the model is uncertain of (ESLM, arXiv 2505.19893).

The share ``KEEP`` of each row's tokens for which the model's predictions have the highest entropy is trained on, the
others are only read. Takes what a finished anneal started from (make demo leaves one):

    python examples/selective.py runs/demo/iteration_000/anneal/stage.yaml runs/demo/iteration_000/selective

Everything but the objective is the anneal's: rows and their order, schedule, layout, checkpoints, metrics.jsonl. An
objective that is to be a recipe's line goes into nemo_rmt/objectives/ and nemo_rmt/stages/anneal.py, like Rho-1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.objectives import LossOutput, ntp_loss
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.pretrain import CorpusBatches
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training

KEEP = 0.7


def uncertain_tokens(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Next-token prediction on each row's tokens of the highest entropy, averaged over these alone."""
    counted = batch.loss_mask.bool()
    entropy = scores.entropy.detach().masked_fill(~counted, -1.0)
    rank = entropy.argsort(-1, descending=True).argsort(-1)
    selected = (counted & (rank < KEEP * counted.sum(-1, keepdim=True))).float()
    output = ntp_loss(scores.logprobs, selected)
    output.metrics["selective/selected"] = (selected.sum(), batch.loss_mask.sum())
    return output


def run(session: Session) -> None:
    """The anneal's loop with another objective."""
    settings = session.settings
    batches = CorpusBatches(session, "anneal", 0)
    training = Training(session, session.require_input("checkpoint"), with_optimizer=True)
    for step in training.steps():
        batch = batches.batch(step)
        micro_batches = batch.micro_batches(settings.micro_batch_size)
        metrics = training.model.train_step(micro_batches, uncertain_tokens, with_entropy=True)
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
