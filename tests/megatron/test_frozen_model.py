"""A model that is only scored, with its weights on the GPU throughout or only meanwhile."""

from __future__ import annotations

import pytest
import torch
from tiny_model import VOCAB, random_batch, tiny_recipe, world

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
    expected = ScoredModel(chunks(), tiny_recipe().parallel).score(batch(), 2, with_entropy=True, top_k=3)
    found = FrozenModel(chunks(), tiny_recipe().parallel).score(batch(), 2, with_entropy=True, top_k=3)
    assert (found.divergence, expected.divergence) == (None, None)
    for one, other in zip(
        found._replace(divergence=found.hits), expected._replace(divergence=expected.hits), strict=True
    ):
        assert torch.equal(one, other) and not one.requires_grad


def test_its_hidden_states_and_output_weight_make_the_distribution_that_it_scores_by():
    model, rows = FrozenModel(chunks(), tiny_recipe().parallel), batch()
    states, weight = model.hidden_states(rows, 2), model.output_weight
    assert states.shape == (*rows.tokens.shape, tiny_recipe().model.hidden_size) and not states.requires_grad
    distribution = (states @ weight.t())[..., :VOCAB].log_softmax(-1)
    scores = model.score(rows, 2, top_k=5)
    torch.testing.assert_close(distribution.gather(2, rows.labels[..., None])[..., 0], scores.logprobs)
    torch.testing.assert_close(distribution.topk(5).values, scores.top_logprobs)
    torch.testing.assert_close(distribution.gather(2, scores.top_tokens), scores.top_logprobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to make room on")
def test_offloading_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="offload makes room on a GPU"):
        FrozenModel(chunks(), tiny_recipe().parallel, offload=True)


@pytest.mark.gpu
@on_gpu
def test_offloaded_weights_are_on_the_gpu_only_while_scoring():
    expected = ScoredModel(chunks(), tiny_recipe().parallel).score(batch(), 2).logprobs
    whole = FrozenModel(chunks(), tiny_recipe().parallel)
    states, output_weight = whole.hidden_states(batch(), 2), whole.output_weight
    before = torch.cuda.memory_allocated()
    held = chunks()
    weights = torch.cuda.memory_allocated() - before
    model = FrozenModel(held, tiny_recipe().parallel, offload=True)
    left = torch.cuda.memory_allocated() - before
    assert weights > 10_000 and left < weights / 10
    for _ in range(2):
        rows = batch()
        assert torch.equal(model.score(rows, 2).logprobs, expected)
        assert torch.equal(model.hidden_states(rows, 2), states)
        assert torch.equal(model.output_weight, output_weight)
        assert {parameter.device.type for chunk in held for parameter in chunk.parameters()} == {"cpu"}
        assert all(parameter.data.is_pinned() for chunk in held for parameter in chunk.parameters())
    del rows
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before - left < weights / 2
