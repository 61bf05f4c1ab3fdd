"""Prompts that occur several times are computed once, and sampled from as if they were not."""

from __future__ import annotations

import pytest
import torch
from small_recipe import small_recipe
from tiny_model import world

from nemo_rmt.megatron.model import build_model
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine, _prompt_batches

VOCAB = 40
"""Few tokens: with more, a random number comes near enough to a bound between two that rounding decides."""
SAMPLING = Sampling(12, frozenset({0, 9}), seed=3)
PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3], [4, 5], [6, 7, 8], [1, 2, 3], [4, 5]]
EVEN = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6], [1, 2, 3]]
DOCUMENTS = [list(range(10, 22)), list(range(5, 14))]
BRANCHES = [(0, 7, [1, 2]), (1, 4, [3]), (0, 7, [1, 2]), (0, 12, [1, 2]), (1, 4, [3]), (0, 7, [1])]


@pytest.fixture(scope="module")
def engine():
    with world():
        recipe = small_recipe("unused")
        torch.manual_seed(1)
        chunks = build_model(recipe.model, recipe.parallel, VOCAB)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(1.5)  # a less even distribution, so that errors show
        yield InProcessEngine(chunks, 64)


@pytest.fixture
def forwards(engine, monkeypatch) -> list[tuple[int, int]]:
    """Rows and columns of every forward."""
    shapes, forward = [], engine.chunks[0].forward
    monkeypatch.setattr(
        engine.chunks[0], "forward", lambda tokens, *rest: shapes.append(tuple(tokens.shape)) or forward(tokens, *rest)
    )
    return shapes


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    assert [rollout.response for rollout in found] == [rollout.response for rollout in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, EVEN], ids=["padded", "even"])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_copies_of_a_prompt_are_answered_as_each_alone_would_be(engine, prompts, top_p):
    sampling = Sampling(12, SAMPLING.stop_tokens, seed=3, top_p=top_p)
    alone = [engine.generate([prompt], [index], sampling)[0] for index, prompt in enumerate(prompts)]
    found = engine.generate(prompts, list(range(len(prompts))), sampling)
    assert_same(found, alone)
    assert len({tuple(rollout.response) for rollout in found}) == len(prompts)  # each with its own random numbers


def test_a_prompt_is_computed_once_for_all_its_copies(engine, forwards):
    engine.generate(PROMPTS, list(range(len(PROMPTS))), SAMPLING)
    assert forwards[:2] == [(3, 3), (len(PROMPTS), 1)]


def test_branches_with_one_instruction_at_one_position_are_computed_once(engine, forwards):
    prompts = [BranchPrompt(*branch) for branch in BRANCHES]
    found = engine.generate_branches(DOCUMENTS, prompts, list(range(len(prompts))), SAMPLING)
    assert forwards[:3] == [(2, 12), (4, 2), (len(BRANCHES), 1)]
    alone = [engine.generate_branches(DOCUMENTS, [p], [index], SAMPLING)[0] for index, p in enumerate(prompts)]
    assert_same(found, alone)


def test_the_last_token_of_the_limit_is_not_computed(engine, forwards):
    engine.generate(EVEN, list(range(len(EVEN))), Sampling(4, frozenset(), seed=0))
    assert forwards == [(2, 3), *[(len(EVEN), 1)] * 3]


def test_copies_of_a_prompt_share_a_batch():
    assert _prompt_batches(PROMPTS, 4) == [[1, 3, 6], [0, 2, 5, 4]]
    assert _prompt_batches(PROMPTS, 2) == [[1, 3], [6], [0, 2], [5, 4]]
