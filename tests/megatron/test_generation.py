"""Sampling with the cache against the model's own forward without one."""

from __future__ import annotations

import numpy
import pytest
import torch
from dense_masks import document_mask
from small_recipe import small_recipe

from nemo_rmt.megatron.generation import generate
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import Sampling, sampling_noise

VOCAB, STOP = 300, 7


@pytest.fixture(scope="module")
def chunks():
    recipe = small_recipe("unused")
    with distributed(recipe.parallel, seed=5):
        model = build_model(recipe.model, recipe.parallel, VOCAB)
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.mul_(3)  # a peaked distribution, so that errors show
        yield model


def logits_without_cache(model, tokens: list[int]) -> torch.Tensor:
    """float32 ``[vocabulary]`` of the last position."""
    row = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(row, positions, document_mask(torch.zeros_like(row)))[0]


PROMPTS = [[11, 12, 13, 14, 15, 16], [21], [31, 32, 33], [41, 42, 43, 44]]


def test_greedy_tokens_and_logprobs_equal_a_forward_without_cache(chunks):
    sampled = generate(chunks, PROMPTS, numpy.zeros((4, 8)), stop_tokens=frozenset({STOP}), temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for step in range(int(sampled.lengths[row])):
            logprobs = torch.log_softmax(logits_without_cache(chunks[0], tokens), dim=-1)
            assert int(sampled.tokens[row, step]) == int(logprobs.argmax())
            assert float(sampled.logprobs[row, step]) == pytest.approx(float(logprobs.max()), abs=1e-4)
            tokens.append(int(sampled.tokens[row, step]))


def test_a_sequence_does_not_depend_on_its_batch(chunks):
    sampling = Sampling(10, frozenset({STOP}), seed=1)
    noise = sampling_noise([0, 1, 2, 3], sampling)
    together = generate(chunks, PROMPTS, noise, stop_tokens=sampling.stop_tokens)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(chunks, [prompt], noise[row : row + 1], stop_tokens=sampling.stop_tokens)
        length = int(alone.lengths[0])
        assert int(together.lengths[row]) == length
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()


def test_rows_end_at_the_stop_token_and_say_so(chunks):
    stop = frozenset(range(0, VOCAB, 4))
    sampled = generate(
        chunks, PROMPTS * 8, sampling_noise(list(range(32)), Sampling(12, stop, seed=2)), stop_tokens=stop
    )
    assert 0 < int(sampled.finished.sum()) < 32 or sampled.lengths.min() < sampled.lengths.max()
    for row in range(32):
        tokens = sampled.tokens[row, : int(sampled.lengths[row])].tolist()
        assert not any(token in stop for token in tokens[:-1])
        assert (tokens[-1] in stop) == bool(sampled.finished[row])


def test_sampled_frequencies_follow_the_model(chunks):
    logits = logits_without_cache(chunks[0], PROMPTS[0])
    expected = torch.softmax(logits / 1.5, dim=-1)
    noise = sampling_noise(list(range(4000)), Sampling(1, frozenset(), seed=3))
    sampled = generate(chunks, [PROMPTS[0]] * 4000, noise, stop_tokens=frozenset(), temperature=1.5)
    found = torch.bincount(sampled.tokens[:, 0], minlength=VOCAB) / 4000
    assert float((found - expected).abs().sum()) / 2 < 0.1  # total variation; 300 outcomes from 4,000 draws


def test_top_p_draws_from_the_nucleus_only(chunks):
    probabilities = torch.softmax(logits_without_cache(chunks[0], PROMPTS[0]), dim=-1)
    ordered, order = probabilities.sort(descending=True)
    nucleus = set(order[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    noise = sampling_noise(list(range(500)), Sampling(1, frozenset(), seed=4))
    sampled = generate(chunks, [PROMPTS[0]] * 500, noise, stop_tokens=frozenset(), top_p=0.5)
    assert set(sampled.tokens[:, 0].tolist()) <= nucleus


def test_the_model_is_left_as_it_was(chunks):
    chunks[0].train()
    generate(chunks, PROMPTS, numpy.zeros((4, 2)), stop_tokens=frozenset())
    assert chunks[0].training
    assert all(getattr(module, "cache", None) is None for module in chunks[0].modules())
