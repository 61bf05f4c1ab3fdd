"""Parameter counts against published ones, and against the models that Megatron builds."""

from __future__ import annotations

import pytest
import torch
from nemo_rmt.recipes import build
from small_recipe import small_recipe
from tiny_model import VOCAB, world

from nemo_rmt.config import Parallel
from nemo_rmt.megatron import model
from nemo_rmt.megatron.cpu import redirected
from nemo_rmt.plan.parameters import layer_parameters, padded_rows, parameter_count, rank_parameters

PUBLISHED = {
    "olmo2_1b": 1_484_916_736,
    "smollm3_3b": 3_075_098_624,
    "qwen3_14b": 14_768_307_200,
    "r1_distill_qwen_14b": 14_770_033_664,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_recipe_has_the_published_number_of_parameters_computed_and_built_by_megatron(name):
    assert parameter_count(build(name)) == PUBLISHED[name]
    settings = build(name).model
    with world(), redirected(), torch.device("meta"):
        built = model.LogprobGPT(settings, model.transformer_config(settings, Parallel()), settings.vocab_size, None)
        assert sum(parameter.numel() for parameter in built.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False, "qkv_bias": False},
        {"tie_embeddings": False, "head_dim": 32},
        {"qk_norm_span": "all_heads", "norm_position": "after", "num_query_groups": 4},
        {"rope_skip_interval": 2, "vocab_size": 400},
    ],
)
def test_a_rank_has_as_many_parameters_as_its_model(changes):
    recipe = small_recipe("unused", model=changes)
    rows = recipe.model.vocab_size or VOCAB
    with world():
        (chunk,) = model.build_model(recipe.model, recipe.parallel, rows)
        built = sum(parameter.numel() for parameter in chunk.parameters())
    assert rank_parameters(recipe.model, recipe.parallel, rows, 0) == built
    tables = 1 if recipe.model.tie_embeddings else 2
    padding = tables * (padded_rows(rows) - rows) * recipe.model.hidden_size
    assert parameter_count(recipe, VOCAB) == built - padding


def test_a_layer_of_the_14b_model_is_megatrons():
    settings = build("qwen3_14b").model
    with world(), redirected(), torch.device("meta"):
        built = model.LogprobGPT(settings, model.transformer_config(settings, Parallel()), settings.vocab_size, None)
    (first, *_) = built.decoder.layers
    assert layer_parameters(settings) == sum(parameter.numel() for parameter in first.parameters())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_ranks_of_a_pipeline_hold_the_model_once_but_for_tied_embeddings(tie, tensor):
    settings = small_recipe("unused", model={"tie_embeddings": tie}).model
    whole = rank_parameters(settings, Parallel(tensor=tensor), VOCAB, 0)
    parts = [rank_parameters(settings, Parallel(tensor=tensor, pipeline=2), VOCAB, rank) for rank in range(2)]
    again = padded_rows(VOCAB) // tensor * settings.hidden_size if tie else 0
    assert sum(parts) == whole + again
