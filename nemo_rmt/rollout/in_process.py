"""Rollouts from the training processes themselves: the live Megatron weights, nothing to synchronise."""

from __future__ import annotations

import functools
from collections.abc import Callable

from nemo_rmt.megatron.generation import Trunks, generate
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.rollout.engine import (
    BranchPrompt,
    Pending,
    Rollout,
    RolloutEngine,
    Sampling,
    require_positions,
    sampling_noise,
)


class InProcessEngine(RolloutEngine):
    """Samples from the given model chunks, ``batch_size`` sequences at once, when they are waited for.

    version: gives the training steps the weights have had.
    """

    def __init__(self, chunks: list[LogprobGPT], batch_size: int, version: Callable[[], int] = lambda: 0):
        super().__init__()
        self.chunks = chunks
        self.batch_size = batch_size
        self.version = version

    def update_weights(self) -> None:
        """Nothing to do: it samples from the weights in training."""

    def submit(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> Pending:
        """See RolloutEngine."""
        return functools.partial(self._generate, prompts, sample_ids, sampling)

    def submit_branches(
        self, documents: list[list[int]], prompts: list[BranchPrompt], sample_ids: list[int], sampling: Sampling
    ) -> Pending:
        """See RolloutEngine."""
        require_positions(documents, prompts)
        return functools.partial(self._generate_branches, documents, prompts, sample_ids, sampling)

    def _generate(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> list[Rollout]:
        """Prompts of similar length share a batch, which does not change what is sampled."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rollouts: dict[int, Rollout] = {}
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            rollouts |= self._sample(indices, prompts, sample_ids, sampling)
        return [rollouts[index] for index in range(len(prompts))]

    def _generate_branches(
        self, documents: list[list[int]], prompts: list[BranchPrompt], sample_ids: list[int], sampling: Sampling
    ) -> list[Rollout]:
        """Whole documents share a batch, those of similar length; one with more branches than a batch holds takes
        several."""
        own = [prompt.tokens for prompt in prompts]
        rollouts: dict[int, Rollout] = {}
        for indices in _document_batches(prompts, self.batch_size):
            used = sorted({prompts[index].document for index in indices})
            trunks = Trunks(
                documents=[documents[document] for document in used],
                indices=[used.index(prompts[index].document) for index in indices],
                positions=[prompts[index].position for index in indices],
            )
            rollouts |= self._sample(indices, own, sample_ids, sampling, trunks)
        return [rollouts[index] for index in range(len(prompts))]

    def _sample(
        self,
        indices: list[int],
        prompts: list[list[int]],
        sample_ids: list[int],
        sampling: Sampling,
        trunks: Trunks | None = None,
    ) -> dict[int, Rollout]:
        """One batch: the rollouts of these prompts by index."""
        sampled = generate(
            self.chunks,
            [prompts[index] for index in indices],
            sampling_noise([sample_ids[index] for index in indices], sampling),
            stop_tokens=sampling.stop_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            marker=sampling.marker,
            after_marker=sampling.after_marker,
            trunks=trunks,
        )
        columns = (sampled.tokens, sampled.logprobs, sampled.lengths, sampled.finished)
        version = self.version()
        return {
            index: Rollout(prompts[index], tokens[:length], logprobs[:length], finished, version)
            for index, tokens, logprobs, length, finished in zip(indices, *(c.tolist() for c in columns), strict=True)
        }


def _document_batches(prompts: list[BranchPrompt], batch_size: int) -> list[list[int]]:
    """Indices of the prompts of each batch."""
    by_document: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index].position):
        by_document.setdefault(prompts[index].document, []).append(index)
    pieces = [
        indices[start : start + batch_size]
        for indices in by_document.values()
        for start in range(0, len(indices), batch_size)
    ]
    batches: list[list[int]] = []
    # What is computed of a document ends at its last fork.
    for piece in sorted(pieces, key=lambda piece: prompts[piece[-1]].position):
        if not batches or len(batches[-1]) + len(piece) > batch_size:
            batches.append([])
        batches[-1].extend(piece)
    return batches
