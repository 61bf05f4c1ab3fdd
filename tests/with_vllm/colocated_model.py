"""Small models in training with vLLM beside them, and what the trainer says of responses."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nemo_rmt.config import Recipe
from nemo_rmt.megatron.model import LogprobGPT, build_model
from nemo_rmt.megatron.runtime import Layout
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.rollout.vllm.build import vllm_engine
from nemo_rmt.rollout.vllm.engine import VLLMEngine

VOCAB, MARKER, STOPS = 60, 17, frozenset({0, 9})
TOLERANCE = 1e-4


def build(settings: Recipe, seed: int = 1) -> list[LogprobGPT]:
    """The model; large random biases and norm weights, too, so that none can be missed."""
    torch.manual_seed(seed)
    chunks = build_model(settings.model, settings.parallel, VOCAB)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() == 1:
                torch.manual_seed(len(name))  # the same on all tensor-parallel ranks
                parameter.data += 0.3 * torch.randn_like(parameter)
    return chunks


@contextlib.contextmanager
def running(
    settings: Recipe,
    layout: Layout,
    chunks: list[LogprobGPT],
    folder: Path,
    version: Callable[[], int] = lambda: 0,
) -> Iterator[VLLMEngine]:
    """The recipe's engine."""
    engine = vllm_engine(settings, layout, chunks, folder=folder, vocab_size=VOCAB, eos=0, version=version)
    try:
        yield engine
    finally:
        engine.close()


def prompts(count: int, seed: int = 0, longest: int = 70) -> list[list[int]]:
    """Random tokens, 1 to ``longest`` of them."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def logits(chunks: list[LogprobGPT], rollout: Rollout) -> torch.Tensor:
    """Of every response token, ``[tokens, vocabulary]``; one process's model."""
    sequence = torch.tensor([rollout.prompt + rollout.response])
    places = range(len(rollout.prompt), sequence.shape[1])
    return torch.cat([chunks[0](sequence[:, :end], torch.arange(end)[None], None) for end in places])


def scores(chunks: list[LogprobGPT], rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """The trainer's log-probability of every response token."""
    sequence = torch.tensor([rollout.prompt + rollout.response])
    with torch.no_grad():
        found = chunks[0](
            sequence[:, :-1],
            torch.arange(sequence.shape[1] - 1)[None],
            None,
            sequence[:, 1:],
            temperature=temperature,
        )
    return found.logprobs[0, len(rollout.prompt) - 1 :]


def largest_error(chunks: list[LogprobGPT], rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Of the rollouts' log-probabilities against the trainer's."""
    return max(
        (scores(chunks, rollout, temperature) - torch.tensor(rollout.logprobs)).abs().max().item()
        for rollout in rollouts
    )


def require_same(rollouts: list[Rollout], others: list[Rollout]) -> None:
    """The same responses, with log-probabilities that agree."""
    for rollout, other in zip(rollouts, others, strict=True):
        assert (rollout.prompt, rollout.response) == (other.prompt, other.response)
        assert rollout.finished == other.finished
        assert torch.allclose(torch.tensor(rollout.logprobs), torch.tensor(other.logprobs), atol=TOLERANCE, rtol=0)
