"""What a second model adds to the batches of an anneal: its log-probabilities of the labels, or its distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nemo_rmt.config import CachedReference
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.logprob_cache import LogprobCache
from nemo_rmt.megatron.train_step import FrozenModel
from nemo_rmt.profiling import part
from nemo_rmt.reference_cache import open_reference, require_fitting
from nemo_rmt.stages.pretrain import CorpusBatches
from nemo_rmt.stages.session import Session

Extras = Callable[[int, TokenBatch], dict[str, Tensor]]
"""From a step and its batch, tensors ``[rows, sequence, ...]`` to travel with it; none where no loss is computed."""

UNLIKELY = -30.0
"""Nats; of cached tokens where the cache has no number and the loss no weight: finite, as a gradient of 0 needs it."""


def logprobs(session: Session, checkpoint: Path, *, hits: bool) -> Extras:
    """A checkpoint's log-probabilities of the labels, from a forward pass over every batch.

    hits: as the reference's, with whether each label is its first guess; else as the frozen start's.
    """
    model, size = frozen(session, checkpoint), session.settings.micro_batch_size

    def extras(step: int, batch: TokenBatch) -> dict[str, Tensor]:
        scores = model.score(batch, size)
        if scores is None:
            return {}
        if not hits:
            return {"frozen_logprobs": scores.logprobs}
        return {"reference_logprobs": scores.logprobs, "reference_hits": scores.hits}

    return extras


def hidden_states(session: Session, checkpoint: Path) -> tuple[Extras, Tensor | None]:
    """A checkpoint's last hidden states, from a forward pass over every batch; and the output weight that makes a
    distribution of them, None where no loss is computed."""
    model, size = frozen(session, checkpoint), session.settings.micro_batch_size

    def extras(step: int, batch: TokenBatch) -> dict[str, Tensor]:
        states = model.hidden_states(batch, size)
        return {} if states is None else {"teacher_hidden": states}

    return extras, model.output_weight


def frozen(session: Session, checkpoint: Path) -> FrozenModel:
    """A model that only guides."""
    return session.frozen_model(checkpoint, offload=session.settings.guide.offload)


def cached_logprobs(session: Session, batches: CorpusBatches, reference: CachedReference) -> Extras:
    """What ``nemo-rmt data score`` left. Raises UserError when it is not of this run's data."""
    cache = _open(session, reference)

    def extras(step: int, batch: TokenBatch) -> dict[str, Tensor]:
        if not _has_loss(session):
            return {}
        with part("data"):
            labels = torch.from_numpy(cache.logprobs(batches.stretches(step))[:, 1:]).to(session.layout.device)
            # A document's first token has no number, and no weight. Any other without one would make the loss NaN.
            return {"reference_logprobs": torch.where(batch.loss_mask > 0, labels, 0.0)}

    return extras


def cached_distribution(session: Session, batches: CorpusBatches, reference: CachedReference) -> Extras:
    """The likeliest tokens that ``nemo-rmt data score top_k=...`` left. Raises UserError as cached_logprobs does."""
    cache = _open(session, reference)

    def extras(step: int, batch: TokenBatch) -> dict[str, Tensor]:
        if not _has_loss(session):
            return {}
        with part("data"):
            found = cache.top(batches.stretches(step))
            tokens, values = (torch.from_numpy(each[:, 1:]).to(session.layout.device) for each in found)
            counted = (batch.loss_mask > 0)[..., None]
            others = torch.arange(cache.top_k, device=tokens.device)
            return {
                "teacher_tokens": torch.where(counted, tokens, others),
                "teacher_logprobs": torch.where(counted, values, UNLIKELY),
            }

    return extras


def _open(session: Session, reference: CachedReference) -> LogprobCache:
    cache = open_reference(session.recipe, session.require_input("cache"))
    require_fitting(cache, session.recipe, reference, session.data_folder)
    return cache


def _has_loss(session: Session) -> bool:
    """Whether this is a rank of the last pipeline stage."""
    return session.layout.pipeline_rank == session.layout.pipeline_size - 1
