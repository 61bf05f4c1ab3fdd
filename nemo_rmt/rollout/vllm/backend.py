"""What is asked of one replica of vLLM, wherever it runs, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy
from torch import Tensor

from nemo_rmt.rollout.engine import Sampling


@dataclass(frozen=True)
class Request:
    """One sequence to sample.

    tokens: the prompt, at least one. max_tokens: longest response, the stop token included. temperature: 0 is greedy.
    seed: of the sequence's own random stream, 0 to 2^63 - 1. stop_tokens: ids that end it; part of the response.
    """

    tokens: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What was sampled.

    logprobs: of each token at the sampling temperature (greedy: at 1) before top-p, in nats. stopped: by a stop token,
    not by the length. version: training steps of the weights; of its oldest token.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    version: int


class BackendLost(Exception):
    """vLLM ended or no longer answers; the message says what is known of it. The weights in training are intact."""


class Backend(Protocol):
    """One replica of vLLM, seen from a rank that may ask it."""

    @property
    def prefix_cached(self) -> float:
        """Share of the last call's prompt tokens that were found in the cache."""

    def complete(self, requests: list[Request]) -> list[Completion]:
        """One completion per request, in order. Raises BackendLost."""

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Serve these weights from here on, and nothing cached of those before. Raises BackendLost."""

    def restart(self) -> None:
        """Bring back what was lost, without weights. Raises EngineLost."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Answers:
    """What one rank has to give: the completions of its replica's requests, and what the cache spared.

    prompt_tokens: asked for. cached: those of them found in the cache. lost: why there are no completions.
    """

    completions: list[Completion] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached: float = 0.0
    lost: str | None = None


def respond(backend: Backend, questions: list[tuple[list[int], int]], sampling: Sampling) -> Answers:
    """Ask a replica for one response to each prompt and sample id, in two phases where there is a marker.

    ``stopped`` of the completions is ``Rollout.finished``. Raises BackendLost.
    """
    stops = tuple(sorted(sampling.stop_tokens))
    last = {*stops} if sampling.marker is None else {*stops, sampling.marker}

    def request(tokens: list[int], sample_id: int, phase: int, max_tokens: int, ends: tuple[int, ...]) -> Request:
        seed = sequence_seed(sampling.seed, sample_id, phase)
        return Request(tokens, max_tokens, sampling.temperature, sampling.top_p, seed, ends)

    first = [request(prompt, id_, 0, sampling.max_new_tokens, tuple(sorted(last))) for prompt, id_ in questions]
    completions = backend.complete(first)
    prompt_tokens = sum(len(each.tokens) for each in first)
    cached = backend.prefix_cached * prompt_tokens
    places, second = [], []
    for place, ((prompt, id_), completion) in enumerate(zip(questions, completions, strict=True)):
        if not completion.stopped or completion.tokens[-1] in sampling.stop_tokens:
            continue
        limit = min(sampling.after_marker, sampling.max_new_tokens - len(completion.tokens))
        if limit == 0:
            completions[place] = dataclasses.replace(completion, stopped=False)
            continue
        places.append(place)
        second.append(request(prompt + completion.tokens, id_, 1, limit, stops))
    if second:
        for place, rest in zip(places, backend.complete(second), strict=True):
            completions[place] = _joined(completions[place], rest, sampling)
    return Answers(completions, prompt_tokens, cached)


def _joined(until: Completion, rest: Completion, sampling: Sampling) -> Completion:
    """A response until its marker and what came after it."""
    return Completion(
        until.tokens + rest.tokens,
        until.logprobs + rest.logprobs,
        rest.stopped or len(rest.tokens) == sampling.after_marker,
        min(until.version, rest.version),
    )


def sequence_seed(seed: int, sample_id: int, phase: int) -> int:
    """The seed of one sequence's random stream, 63 bits; phase: 0, or 1 after the marker."""
    return int(numpy.random.Philox(key=[seed, sample_id], counter=phase).random_raw()) >> 1
