"""The nearest changes to a recipe that does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.plan.memory import available, memory
from nemo_rmt.plan.step_time import step_time
from nemo_rmt.plan.workload import workloads
from nemo_rmt.recipe_io import validate

SHOWN = 4
MOST_CHANGES = 4
"""Keys changed together; more than these are another recipe."""

Overrides = dict[str, Any]


def unfit(recipe: Recipe, vocab_size: int) -> list[str]:
    """The stages that need more than a GPU has."""
    return [w.stage for w in workloads(recipe) if memory(recipe, w, vocab_size).peak > available(recipe)]


def nearest_changes(recipe: Recipe, vocab_size: int) -> list[Overrides]:
    """Changes with which every stage fits: as few keys as possible, those on the same machines first, then the fastest.
    Empty when there are none."""
    stages = unfit(recipe, vocab_size)
    for count in range(1, MOST_CHANGES + 1):
        found = []
        for overrides in _candidates(recipe, stages, count):
            try:
                changed = changed_recipe(recipe, overrides)
            except UserError:  # batches or heads do not divide
                continue
            if not unfit(changed, vocab_size):
                found.append(("cluster.nodes" in overrides, _hours(changed, vocab_size), overrides))
        if found:
            return [overrides for *_, overrides in sorted(found, key=lambda each: each[:2])[:SHOWN]]
    return []


def changed_recipe(recipe: Recipe, overrides: Overrides) -> Recipe:
    """The recipe with some keys changed, checked as any other. Raises UserError."""
    values = recipe.model_dump()
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = value
    return validate(Recipe, values)


def written(overrides: Overrides) -> str:
    """As the command line takes them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in overrides.items())


def _candidates(recipe: Recipe, stages: list[str], count: int) -> Iterator[Overrides]:
    """Every change of exactly ``count`` keys."""
    for choice in itertools.combinations(_choices(recipe, stages), count):
        for values in itertools.product(*(values for _, values in choice)):
            yield {key: value for (key, _), value in zip(choice, values, strict=True)}


def _choices(recipe: Recipe, stages: list[str]) -> list[tuple[str, list[Any]]]:
    """The keys that may change, and to what."""
    cluster, parallel = recipe.cluster, recipe.parallel
    choices: list[tuple[str, list[Any]]] = [
        ("parallel.tensor", [size for size in (1, 2, 4, 8) if size <= cluster.gpus_per_node]),
        ("parallel.pipeline", [1, 2, 4]),
        ("parallel.sequence", [True, False]),
        ("parallel.recompute", ["full"]),
        ("parallel.distributed_optimizer", [True]),
        ("rollout.batch_size", [recipe.rollout.batch_size // divisor for divisor in (2, 4, 8)]),
        ("cluster.nodes", [cluster.nodes * factor for factor in (2, 4)]),
    ]
    for stage in dict.fromkeys(stages):
        size = getattr(recipe, stage).micro_batch_size
        choices.append((f"{stage}.micro_batch_size", sorted({size // 2, 1} - {0, size}, reverse=True)))
    now = {
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.sequence": parallel.sequence,
        "parallel.recompute": parallel.recompute,
        "parallel.distributed_optimizer": parallel.distributed_optimizer,
    }
    possible = [(key, [value for value in values if value and value != now.get(key)]) for key, values in choices]
    return [(key, values) for key, values in possible if values]


def _hours(recipe: Recipe, vocab_size: int) -> float:
    return sum(w.times * w.steps * step_time(recipe, w, vocab_size).seconds for w in workloads(recipe))
