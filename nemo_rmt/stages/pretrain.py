"""Pre-training: next-token prediction at a stable learning rate."""

from __future__ import annotations

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.logprob_cache import Stretches
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.objectives import LossOutput, ntp_loss
from nemo_rmt.profiling import part
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training


def next_token(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Plain next-token prediction."""
    return ntp_loss(scores.logprobs, batch.loss_mask)


class CorpusBatches:
    """This rank's rows of the stage's blend by step, in an order fixed by the seed and ``names``."""

    def __init__(self, session: Session, *names: str | int):
        self.session = session
        self.rows = session.training_rows(session.settings, *names)

    def batch(self, step: int) -> TokenBatch:
        """The rows of a step, from 0."""
        with part("data"):
            tokens = self.rows.rows(self._indices(step)).to(self.session.layout.device)
            return TokenBatch.from_documents(
                tokens, self.session.tokenizer.eod, self.session.recipe.data.document_attention
            )

    def stretches(self, step: int) -> list[Stretches]:
        """Where the tokens of each row of a step, and the one that follows them, stand in the datasets."""
        return [self.rows.stretches(index) for index in self._indices(step)]

    def samples(self, step: int) -> list[tuple[int, str]]:
        """Every document that each row of a step has tokens of, as "corpus:document", by the row's index."""
        return [
            (index, f"{prefix.parent.name}:{document}")
            for index in self._indices(step)
            for prefix, document in self.rows.documents(index)
        ]

    def _indices(self, step: int) -> list[int]:
        size = self.session.settings.global_batch_size
        return [step * size + index for index in self.session.shard(size)]


def run(session: Session) -> None:
    """Train from initial weights."""
    settings = session.settings
    batches = CorpusBatches(session, "pretrain")
    training = Training(session, start=None)
    for step in training.steps():
        batch = batches.batch(step)
        metrics = training.model.train_step(batch.micro_batches(settings.micro_batch_size), next_token)
        tokens = settings.global_batch_size * settings.sequence_length
        training.record(metrics, tokens=tokens, samples=lambda: batches.samples(step))
