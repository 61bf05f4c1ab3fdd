"""Pre-training: next-token prediction at a stable learning rate."""

from __future__ import annotations

from collections.abc import Callable

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.objectives import LossOutput, ntp_loss
from nemo_rmt.stages.session import Session, Training


def next_token(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Plain next-token prediction."""
    return ntp_loss(scores.logprobs, batch.loss_mask)


def corpus_batches(session: Session, *names: str | int) -> Callable[[int], TokenBatch]:
    """A function from step to this rank's rows of the stage's blend, in an order fixed by the seed and ``names``."""
    settings = session.settings
    rows = session.training_rows(settings, *names)

    def batch(step: int) -> TokenBatch:
        first = step * settings.global_batch_size
        tokens = rows.rows(first + index for index in session.shard(settings.global_batch_size))
        return TokenBatch.from_documents(
            tokens.to(session.layout.device), session.tokenizer.eod, session.recipe.data.document_attention
        )

    return batch


def run(session: Session) -> None:
    """Train from initial weights."""
    settings = session.settings
    batch_of = corpus_batches(session, "pretrain")
    training = Training(session, start=None)
    for step in training.steps():
        batch = batch_of(step)
        metrics = training.model.train_step(batch.micro_batches(settings.micro_batch_size), next_token)
        training.record(metrics, tokens=settings.global_batch_size * settings.sequence_length)
