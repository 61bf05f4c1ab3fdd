"""A vLLM backend that needs no vLLM: its next token is a function of the tokens before it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_rmt.rollout.engine import EngineLost, Rollout, Sampling
from nemo_rmt.rollout.vllm.backend import BackendLost, Completion, Request

VOCAB = 12


def next_token(tokens: list[int]) -> int:
    """What follows; every token does, in some context."""
    return (sum(place * token for place, token in enumerate(tokens, start=1)) + len(tokens)) % VOCAB


def logprob(tokens: list[int], token: int) -> float:
    """Of a token after others."""
    return -float(token) - len(tokens) / 100


def expected(prompt: list[int], sampling: Sampling, version: int = 0) -> Rollout:
    """The response token by token, as the in-process engine defines it."""
    context, logprobs, left, finished = list(prompt), [], None, False
    while len(logprobs) < sampling.max_new_tokens and not finished:
        token = next_token(context)
        logprobs.append(logprob(context, token))
        context.append(token)
        left = None if left is None else left - 1
        if token == sampling.marker:
            left = sampling.after_marker if left is None else min(left, sampling.after_marker)
        finished = token in sampling.stop_tokens or left == 0
    return Rollout(prompt, context[len(prompt) :], logprobs, finished, version)


def two_tensors() -> Iterator[tuple[str, Tensor]]:
    """A model's weights."""
    yield "a", torch.ones(2)
    yield "b", torch.zeros(3)


@dataclass
class Scripted:
    """Serves ``next_token``. lost_in: the calls, "complete" or "load", that lose it, in order. restarts: allowed."""

    lost_in: list[str] = field(default_factory=list)
    restarts: int = 0
    prefix_cached: float = 0.25
    version: int | None = None
    calls: list[str] = field(default_factory=list)
    asked: list[list[Request]] = field(default_factory=list)
    may_answer: threading.Event | None = None

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.lost_in and self.lost_in[0] == name:
            self.lost_in.pop(0)
            self.version = None
            raise BackendLost(f"exit status 9 in {name}")

    def complete(self, requests: list[Request]) -> list[Completion]:
        if self.may_answer is not None:
            assert self.may_answer.wait(30)
        assert self.version is not None, "asked without weights"
        self._call("complete")
        self.asked.append(requests)
        return [self._completion(request) for request in requests]

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        taken = [next(iter(weights))[0]]
        self._call("load")
        assert taken + [name for name, _ in weights] == ["a", "b"]
        self.version = version

    def restart(self) -> None:
        self.calls.append("restart")
        if self.restarts == 0:
            raise EngineLost("exit status 9, restarted too often")
        self.restarts -= 1

    def close(self) -> None:
        self.calls.append("close")

    def _completion(self, request: Request) -> Completion:
        context, logprobs, stopped = list(request.tokens), [], False
        while len(logprobs) < request.max_tokens and not stopped:
            token = next_token(context)
            logprobs.append(logprob(context, token))
            context.append(token)
            stopped = token in request.stop_tokens
        return Completion(context[len(request.tokens) :], logprobs, stopped, self.version)
