"""Rollouts from the training processes themselves: the live Megatron weights, nothing to synchronise."""

from __future__ import annotations

from nemo_rmt.megatron.generation import generate
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.rollout.engine import Rollout, Sampling, sampling_noise


class InProcessEngine:
    """Samples from the given model chunks, ``batch_size`` sequences at once."""

    def __init__(self, chunks: list[LogprobGPT], batch_size: int):
        self.chunks = chunks
        self.batch_size = batch_size

    def generate(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> list[Rollout]:
        """See RolloutEngine. Prompts of similar length share a batch, which does not change what is sampled."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rollouts: list[Rollout | None] = [None] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            sampled = generate(
                self.chunks,
                [prompts[index] for index in indices],
                sampling_noise([sample_ids[index] for index in indices], sampling),
                stop_tokens=sampling.stop_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
            )
            columns = (sampled.tokens, sampled.logprobs, sampled.lengths, sampled.finished)
            for index, tokens, logprobs, length, finished in zip(indices, *(c.tolist() for c in columns), strict=True):
                rollouts[index] = Rollout(prompts[index], tokens[:length], logprobs[:length], finished)
        return rollouts
