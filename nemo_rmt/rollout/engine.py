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
    every draw, whatever the layout, the batch or the order.
    """

    max_new_tokens: int
    stop_tokens: frozenset[int]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """One response.

    prompt, response: token ids. logprobs: of each response token under the sampler's weights at the sampling
    temperature, before top-p, in nats. finished: it ended with a stop token, not at the length limit.
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
