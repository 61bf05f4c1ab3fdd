"""The plan's bytes against those that Megatron allocates in a real training step, part by part."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe
from tiny_model import VOCAB, trained, world
from torchrun import run_ranks

from nemo_rmt.config import Parallel, Recipe
from nemo_rmt.megatron.cache import caching
from nemo_rmt.plan.activations import head_activations, layer_input, layers_activations
from nemo_rmt.plan.memory import cache_bytes, in_flight, rank_memory
from nemo_rmt.plan.workload import Workload, workloads

WORKER = Path(__file__).with_name("plan_memory_worker.py")
LAYOUTS = {
    "tp1": (1, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}
VARIANTS = {
    "fp32": ({}, {}),
    "fp32, recomputed": ({}, {"recompute": "full"}),
    "bf16": ({"precision": "bf16"}, {}),
    "bf16, recomputed": ({"precision": "bf16"}, {"recompute": "full"}),
    "bf16, optimizer not sharded": ({"precision": "bf16"}, {"distributed_optimizer": False}),
    "like OLMo 2": ({"precision": "bf16", "qk_norm_span": "all_heads", "norm_position": "after"}, {}),
    "like SmolLM3": ({"qk_norm": False, "qkv_bias": False, "tie_embeddings": False, "rope_skip_interval": 2}, {}),
    "a key head per query head": ({"qk_norm": False, "num_query_groups": 4}, {"distributed_optimizer": False}),
}
MODEL = {"hidden_size": 128, "ffn_hidden_size": 384, "num_layers": 8, "max_position": 256}


def recipes_of(layout: str) -> dict[str, Recipe]:
    processes, parallel = LAYOUTS[layout]
    return {
        name: small_recipe(
            "unused",
            model={**MODEL, **model},
            parallel={**parallel, **changes},
            cluster={"gpus_per_node": processes},
            pretrain={"sequence_length": 128},
        )
        for name, (model, changes) in VARIANTS.items()
    }


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tmp_path_factory) -> tuple[dict[str, Recipe], list[dict]]:
    """A layout's recipes and what each of its ranks measured."""
    recipes, folder = recipes_of(request.param), tmp_path_factory.mktemp(request.param)
    processes = LAYOUTS[request.param][0]
    run_ranks(WORKER, processes, f"{folder}/", *(recipe.model_dump_json() for recipe in recipes.values()))
    return recipes, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def saved_at_peak(recipe: Recipe, workload: Workload, rank: int) -> int:
    """The most that autograd keeps: the head's part is gone before a layer is computed again."""
    model, parallel, tokens = recipe.model, recipe.parallel, workload.rows * workload.sequence
    layers = model.num_layers // parallel.pipeline
    head = head_activations(model, parallel, tokens) if rank == parallel.pipeline - 1 else 0
    again = 0
    if parallel.recompute == "full":
        kept = layers_activations(model, parallel, tokens, rank * layers, layers)
        again = max(kept) - layer_input(model, parallel, tokens)
    return rank_memory(recipe, workload, VOCAB, rank).activations + max(head, again)


@pytest.mark.slow
def test_every_part_is_within_a_tenth_of_what_is_allocated(ranks):
    recipes, found = ranks
    wrong = []
    for rank, (name, recipe) in itertools.product(found, recipes.items()):
        measured = rank["measured"][list(recipes).index(name)]
        assert measured["left"] == 0, "the measurement lost count"
        (workload,) = [each for each in workloads(recipe) if each.stage == "pretrain"]
        expected = rank_memory(recipe, workload, VOCAB, rank["pipeline_rank"])
        parts = {part: getattr(expected, part) for part in ("weights", "gradients", "optimizer")}
        parts["saved"] = saved_at_peak(recipe, workload, rank["pipeline_rank"])
        for part, size in parts.items():
            if abs(size / measured[part] - 1) > 0.1:
                wrong.append(f"{name}, pipeline rank {rank['pipeline_rank']}: {part} {size}, not {measured[part]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("model", [{}, {"num_query_groups": 4}, {"precision": "bf16", "head_dim": 32}])
def test_caches_are_those_of_the_sampler(model):
    recipe = small_recipe("unused", model=model)
    rows, prompt, length, trunk = 3, 8, 20, 12
    with world():
        chunks = trained(recipe).modules
        with torch.no_grad(), caching(chunks, trunk) as caches:
            forward = lambda rows, tokens: chunks[0](  # noqa: E731
                torch.ones(rows, tokens, dtype=torch.long), torch.arange(tokens).expand(rows, -1), None
            )
            forward(2, trunk)
            caches.fork(torch.tensor([0, 0, 1]), torch.tensor([4, 12, 3]), length)
            for layer in caches.layers:
                layer.append(layer.trunk_keys[[0, 0, 1], :, :prompt], layer.trunk_values[[0, 0, 1], :, :prompt])
            trunks = [cache for layer in caches.layers for cache in (layer.trunk_keys, layer.trunk_values)]
            own = [cache for layer in caches.layers for cache in (layer.keys, layer.values)]
    layers = recipe.model.num_layers
    assert sum(cache.nbytes for cache in own) == cache_bytes(recipe.model, 1, layers, rows, length)
    assert sum(cache.nbytes for cache in trunks) == cache_bytes(recipe.model, 1, layers, 2, trunk)


def test_half_the_key_value_heads_on_each_of_two_ranks():
    model = small_recipe("unused").model
    assert 2 * cache_bytes(model, 2, 4, 3, 20) == cache_bytes(model, 1, 4, 3, 20)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches", "expected"),
    [(1, None, 8, [1]), (4, None, 8, [4, 3, 2, 1]), (4, None, 2, [2, 2, 2, 1]), (2, 2, 8, [5, 3])],
)
def test_as_many_micro_batches_are_in_flight_as_the_schedule_has(pipeline, virtual, micro_batches, expected):
    parallel = Parallel(pipeline=pipeline, virtual_pipeline=virtual)
    assert [in_flight(parallel, micro_batches, rank) for rank in range(pipeline)] == expected
