"""Rollouts from the training processes themselves: the live Megatron weights, nothing to synchronise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

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
        """Copies of a prompt share a batch, and prompts of similar length, which does not change what is sampled."""
        rollouts: dict[int, Rollout] = {}
        for indices in _prompt_batches(prompts, self.batch_size):
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


def _prompt_batches(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    """Indices of the prompts of each batch: copies of one together."""
    copies: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        copies.setdefault(tuple(prompt), []).append(index)
    return _batches(copies.values(), batch_size, lambda index: len(prompts[index]))


def _document_batches(prompts: list[BranchPrompt], batch_size: int) -> list[list[int]]:
    """Indices of the prompts of each batch: a document's together, copies of one side by side."""
    by_document: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: (prompts[index].position, prompts[index].tokens)):
        by_document.setdefault(prompts[index].document, []).append(index)
    # What is computed of a document ends at its last fork.
    return _batches(by_document.values(), batch_size, lambda index: prompts[index].position)


def _batches(groups: Iterable[list[int]], batch_size: int, length: Callable[[int], int]) -> list[list[int]]:
    """Groups that share a batch: as many as it holds, by the length of their last; larger ones take several."""
    pieces = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    batches: list[list[int]] = []
    for piece in sorted(pieces, key=lambda piece: length(piece[-1])):
        if not batches or len(batches[-1]) + len(piece) > batch_size:
            batches.append([])
        batches[-1].extend(piece)
    return batches
