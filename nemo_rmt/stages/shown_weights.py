"""A few rows of text with the weight of every token, for people to look at."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.runtime import broadcast_from_last_stage
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training
from nemo_rmt.tracking import WEIGHTS

ROWS = 8
"""Rows shown of a step, at most."""


class ShownWeights:
    """Writes rows of a step to weights.jsonl, weighted as the step about to come weighs them.

    Args:
        weights: of every label, from the policy's scores and a batch with the reference's.
    """

    def __init__(self, session: Session, training: Training, weights: Callable[[TokenScores, TokenBatch], Tensor]):
        self.session, self.training, self.weights = session, training, weights

    def write(self, step: int, batch: TokenBatch, samples: list[tuple[int, str]]) -> None:
        """Write the first rows of a step, from 0. samples: the documents of each row, by the row's index.

        Every rank takes part; what data-parallel rank 0 has is written.
        """
        size = self.session.settings.micro_batch_size
        rows = batch.select(slice(0, self.session.whole_rows(min(ROWS, size), size)))
        scores = self.training.model.score(rows, size)
        first = min(index for index, _ in samples)
        records = broadcast_from_last_stage(None if scores is None else self._records(rows, scores))
        for row, record in enumerate(records):
            documents = [name for index, name in samples if index == first + row]
            self.training.tracker.append(WEIGHTS, {"step": step + 1, "documents": documents, **record})

    def _records(self, rows: TokenBatch, scores: TokenScores) -> list[dict[str, list]]:
        """What is said of each row."""
        gaps = rows.extras["reference_logprobs"] - scores.logprobs
        columns = zip(rows.labels, rows.loss_mask, self.weights(scores, rows), gaps, strict=True)
        return [
            {
                "tokens": [self.session.tokenizer.decode([token]) for token in labels.tolist()],
                "weights": _rounded(weights, mask),
                "gaps": _rounded(gap, mask),
            }
            for labels, mask, weights, gap in list(columns)[:ROWS]
        ]


def _rounded(values: Tensor, mask: Tensor) -> list[float | None]:
    """Three digits are enough to look at; null where the label does not count."""
    return [round(value, 3) if counts else None for value, counts in zip(values.tolist(), mask.tolist(), strict=True)]
