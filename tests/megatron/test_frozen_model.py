"""A model that is only scored, with its weights on the GPU throughout or only meanwhile."""

from __future__ import annotations

import pytest
import torch
from tiny_model import VOCAB, random_batch, tiny_recipe, world

from nemo_rmt.errors import UserError
from nemo_rmt.megatron.model import LogprobGPT, build_model
from nemo_rmt.megatron.train_step import FrozenModel, ScoredModel

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


def chunks() -> list[LogprobGPT]:
    """The same weights at every call."""
    torch.manual_seed(1)
    recipe = tiny_recipe()
    return build_model(recipe.model, recipe.parallel, VOCAB)


def batch():
    return random_batch(4).to(torch.cuda.current_device())


def test_a_frozen_model_scores_as_any_other():
    expected = ScoredModel(chunks(), tiny_recipe().parallel).score(batch(), 2, with_entropy=True)
    found = FrozenModel(chunks(), tiny_recipe().parallel).score(batch(), 2, with_entropy=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and not one.requires_grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to make room on")
def test_offloading_without_a_gpu_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"anneal\.remit\.offload=true .* set it to false"):
        FrozenModel(chunks(), tiny_recipe().parallel, offload=True)


@pytest.mark.gpu
@on_gpu
def test_offloaded_weights_are_on_the_gpu_only_while_scoring():
    expected = ScoredModel(chunks(), tiny_recipe().parallel).score(batch(), 2).logprobs
    before = torch.cuda.memory_allocated()
    held = chunks()
    weights = torch.cuda.memory_allocated() - before
    model = FrozenModel(held, tiny_recipe().parallel, offload=True)
    left = torch.cuda.memory_allocated() - before
    assert weights > 10_000 and left < weights / 10
    for _ in range(2):
        rows = batch()
        assert torch.equal(model.score(rows, 2).logprobs, expected)
        assert {parameter.device.type for chunk in held for parameter in chunk.parameters()} == {"cpu"}
        assert all(parameter.data.is_pinned() for chunk in held for parameter in chunk.parameters())
    del rows
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before - left < weights / 2
