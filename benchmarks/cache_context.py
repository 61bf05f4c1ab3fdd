"""What it changes in ReMiT's weights that the cache sees a document whole, and the online reference from its row's cut.

The anneal of a finished run is taken as it was: its rows, its starting checkpoint, its reference. The ratio is the
share of the tokens whose weight changes by more than 0.05.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy
import torch
from measuring import emit

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.logprob_cache import Stretches, decode
from nemo_rmt.megatron.datasets import Documents
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.objectives import remit_weights
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.pretrain import CorpusBatches
from nemo_rmt.stages.score import score_documents
from nemo_rmt.stages.session import Session

CHANGED = 0.05
"""A difference between two weights that counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run with a ReMiT anneal")
    parser.add_argument("--iteration", type=int, default=1, help="whose anneal")
    parser.add_argument("--steps", type=int, default=20, help="of the anneal, whose rows are compared")
    parser.add_argument("--quick", action="store_true", help="two steps")
    given = parser.parse_args()
    folder = given.run.resolve() / f"iteration_{given.iteration:03d}" / "anneal"
    job = StageJob.load(folder / "stage.yaml")
    job.inputs = {role: str(job.input_folder(folder, role)) for role in job.inputs}
    steps = 2 if given.quick else given.steps
    with tempfile.TemporaryDirectory() as scratch, distributed(job.recipe.parallel, job.recipe.seed) as layout:
        for corpus in [None, *(corpus.name for corpus in job.recipe.data.corpora if corpus.weight)]:
            alone = job.model_copy(deep=True)
            for each in alone.recipe.data.corpora:
                each.weight = each.weight if corpus in (None, each.name) else 0.0
            session = Session(alone, Path(scratch) / (corpus or "blend"), layout)
            emit("cache_context", corpus=corpus or "blend", steps=steps, **differences(session, steps))


def differences(session: Session, steps: int) -> dict[str, float]:
    """Weights from the cache's numbers against those from the online reference, over the tokens of some steps."""
    size = session.settings.micro_batch_size
    reference, policy = (session.frozen_model(session.require_input(role)) for role in ("reference", "checkpoint"))
    batches, changes, logprobs, spread = CorpusBatches(session, "anneal", 0), [], [], []
    for step in range(steps):
        batch = batches.batch(step)
        counted = batch.loss_mask > 0
        whole = cached_logprobs(session, reference, batches.stretches(step))[:, 1:].to(counted.device)
        whole = torch.where(counted, whole, 0.0)
        cut, own = (model.score(batch, size).logprobs for model in (reference, policy))
        from_whole, from_cut = (weights(session, each, own, batch) for each in (whole, cut))
        changes.append((from_whole - from_cut).abs()[counted])
        logprobs.append((whole - cut).abs()[counted])
        spread.append((from_cut - 1).abs()[counted])
    change = torch.cat(changes)
    return {
        "tokens": len(change),
        "ratio": round(float((change > CHANGED).float().mean()), 4),
        "mean_weight_change": round(float(change.mean()), 5),
        "mean_weight_off_1": round(float(torch.cat(spread).mean()), 5),
        "mean_logprob_change": round(float(torch.cat(logprobs).mean()), 5),
    }


def cached_logprobs(session: Session, model: ScoredModel, rows: list[Stretches]) -> torch.Tensor:
    """What a cache would have for the tokens of these rows, ``[rows, tokens]``, from scoring their documents alone."""
    found = [numpy.empty(int(row.sizes.sum()), dtype=numpy.float32) for row in rows]
    for prefix in {row.prefix for row in rows}:
        documents = Documents(prefix)
        chosen = numpy.unique(numpy.concatenate([row.documents for row in rows if row.prefix == prefix]))
        lengths = documents.lengths[chosen]
        tokens = numpy.concatenate([documents.tokens(document, document + 1) for document in chosen.tolist()])
        limit = session.settings.sequence_length
        numbers, *_ = score_documents(session, model, tokens, lengths, limit, lambda share: None)
        logprobs = decode(numbers[:, 0])
        # Where each chosen document begins, among the chosen and in the dataset.
        moved = dict(zip(chosen.tolist(), numpy.cumsum(lengths) - lengths, strict=True))
        starts = numpy.cumsum(documents.lengths) - documents.lengths
        for row, target in zip(rows, found, strict=True):
            if row.prefix == prefix:
                places = zip(row.documents.tolist(), row.first, row.sizes, strict=True)
                begins = [(moved[document] + first - starts[document], size) for document, first, size in places]
                target[:] = numpy.concatenate([logprobs[begin : begin + size] for begin, size in begins])
    return torch.from_numpy(numpy.stack(found))


def weights(session: Session, reference: torch.Tensor, policy: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """ReMiT's, with the run's settings."""
    remit = session.settings.remit
    return remit_weights(
        reference, policy, batch.loss_mask, epsilon=remit.epsilon, scale=remit.scale, segment_ids=batch.segment_ids
    )


if __name__ == "__main__":
    main()
