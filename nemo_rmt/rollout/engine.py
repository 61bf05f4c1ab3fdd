"""What a rollout engine takes and gives: prompts as token ids in, responses with their log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
    length limit.
    """

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    finished: bool


class RolloutEngine(Protocol):
    """A sampler of the model in training. The same call on every model-parallel rank returns the same rollouts."""

    def generate(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> list[Rollout]:
        """One response per prompt, in order. ``sample_ids`` name the sequences' random streams."""
        ...

    def generate_branches(
        self, documents: list[list[int]], prompts: list[BranchPrompt], sample_ids: list[int], sampling: Sampling
    ) -> list[Rollout]:
        """As ``generate`` on ``documents[document][:position] + tokens``, but a document is computed once for all its
        branches.
        """
        ...


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
