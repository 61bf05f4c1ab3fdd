"""What a rollout engine takes and gives: prompts as token ids in, responses with their log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    temperature: 0 is greedy. top_p: nucleus. max_new_tokens: longest response in tokens, the stop token included.
    stop_tokens: ids that end a response; the id itself is part of it. seed: with a sequence's sample id it decides
    every draw, whatever the layout, the batch or the order. marker: an id (None: none) after whose first occurrence a
    response has after_marker more tokens, unless something else ends it before; at least one.
    """

    max_new_tokens: int
    stop_tokens: frozenset[int]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    marker: int | None = None
    after_marker: int = 0

    def __post_init__(self):
        if self.marker is not None and self.after_marker < 1:
            raise ValueError(f"a marker needs after_marker of at least 1, got {self.after_marker}")


@dataclass(frozen=True)
class BranchPrompt:
    """A prompt that follows a prefix of a document.

    document: the document's index. position: the prompt follows its first ``position`` tokens; 0 to all of them.
    tokens: the prompt's own, at least one.
    """

    document: int
    position: int
    tokens: list[int]

    def __post_init__(self):
        if not self.tokens:
            raise ValueError("a branch prompt needs at least one token of its own")


@dataclass(frozen=True)
class Rollout:
    """One response.

    prompt, response: token ids; of a branch prompt its own tokens. logprobs: of each response token under the sampler's
    weights at the sampling temperature, before top-p, in nats. finished: a stop token or the marker ended it, not the
    length limit. version: training steps that the weights had had which sampled it; of its oldest token.
    """

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    finished: bool
    version: int = 0


class EngineLost(Exception):
    """The sampler ended, or no longer answers, and could not be brought back. What was trained so far is intact."""


Pending = Callable[[], list[Rollout]]
"""Waits for responses that were asked for: one per prompt, in order, the same on every model-parallel rank. Called by
all ranks, once."""


class RolloutEngine(ABC):
    """A sampler of the model in training. All ranks make the same calls in the same order."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        """Of the last calls, by "rollout/name"."""

    @abstractmethod
    def update_weights(self) -> None:
        """Sample from the weights as they are now, from here on; nothing may be pending. Raises EngineLost."""

    @abstractmethod
    def submit(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> Pending:
        """Ask for one response per prompt. ``sample_ids`` name the sequences' random streams.

        The prompts are those of this data-parallel rank. Waiting for them raises EngineLost, on all ranks.
        """

    @abstractmethod
    def submit_branches(
        self, documents: list[list[int]], prompts: list[BranchPrompt], sample_ids: list[int], sampling: Sampling
    ) -> Pending:
        """As ``submit`` on ``documents[document][:position] + tokens``, but a document is computed once for all its
        branches. Raises ValueError for a position outside of its document.
        """

    def generate(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> list[Rollout]:
        """``submit``, and wait."""
        return self.submit(prompts, sample_ids, sampling)()

    def generate_branches(
        self, documents: list[list[int]], prompts: list[BranchPrompt], sample_ids: list[int], sampling: Sampling
    ) -> list[Rollout]:
        """``submit_branches``, and wait."""
        return self.submit_branches(documents, prompts, sample_ids, sampling)()

    def close(self) -> None:
        """End what was started for sampling."""


def require_positions(documents: list[list[int]], prompts: list[BranchPrompt]) -> None:
    """Raise ValueError for a branch prompt whose position is outside of its document."""
    for prompt in prompts:
        length = len(documents[prompt.document])
        if not 0 <= prompt.position <= length:
            raise ValueError(f"position {prompt.position} is outside of a document of {length} tokens")


def sampling_noise(sample_ids: list[int], sampling: Sampling) -> numpy.ndarray:
    """Uniform numbers in [0, 1), ``[sequences, max_new_tokens]``: one counter-based stream per sequence.

    A token is the inverse of the cumulative distribution at its number, so that a sequence's tokens depend on the seed,
    its id and its probabilities alone.
    """
    return numpy.stack(
        [
            numpy.random.Generator(numpy.random.Philox(key=[sampling.seed, sample_id])).random(sampling.max_new_tokens)
            for sample_id in sample_ids
        ]
    )
