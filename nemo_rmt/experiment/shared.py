"""Stages that are computed once for all arms, seeds and experiments of an output folder that need them.

A stage's name has the digest of everything it is made from: what it reads of the recipe and of which inputs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rmt.chain import PlannedStage, StageRef, plan_chain, recipe_digest
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.experiment.reads import reads_iteration, what_is_read
from nemo_rmt.manifest import METADATA


@dataclass(frozen=True)
class SharedStage:
    """A stage that may belong to several chains."""

    stage: str
    iteration: int
    """0 where the result does not depend on it."""
    recipe: Recipe
    """What it reads of the recipe, not yet runnable: see ``nemo_rmt.experiment.reads``."""
    inputs: dict[str, SharedStage | Path]
    """By role: another stage, or a folder from outside with a manifest.json."""
    digest: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.stage}-{self.digest}"

    @property
    def sources(self) -> list[SharedStage]:
        """The stages it reads."""
        return [source for source in self.inputs.values() if isinstance(source, SharedStage)]

    def input_ids(self) -> dict[str, str]:
        """Identity of each input by role."""
        return {role: _identity(source) for role, source in self.inputs.items()}


Chain = dict[StageRef, SharedStage]
"""The stages of one arm with one seed, in order, by their place in its flywheel."""


def shared_chain(recipe: Recipe, steps: int | None = None) -> Chain:
    """The stages that a recipe's flywheel needs. steps: of its ``stretched`` stage; None: the recipe's.

    Raises UserError when an input from outside has no manifest.
    """
    chain: Chain = {}
    longer = recipe if steps is None else with_steps(recipe, steps)
    for planned in plan_chain(recipe):
        chain[planned.ref] = _shared(longer if planned.ref == stretched(recipe) else recipe, planned, chain)
    return chain


def stretched(recipe: Recipe) -> StageRef:
    """The stage whose steps decide what a chain costs: the last iteration's anneal, or, where plain next-token
    prediction stands in RMT's place, that."""
    plain = recipe.rmt.enabled and recipe.rmt.objective == "ntp"
    return StageRef(recipe.iterations - 1, "rmt" if plain else "anneal")


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with other steps of its ``stretched`` stage, in every iteration, and as many checkpoints on the way:
    what is kept of them (flywheel.keep_checkpoints) then spans the whole stage, for evaluate.along."""
    name = stretched(recipe).stage
    stage = getattr(recipe, name)
    interval = math.ceil(stage.checkpoint_interval * steps / stage.steps)
    return recipe.model_copy(update={name: stage.model_copy(update={"steps": steps, "checkpoint_interval": interval})})


def ancestors(stage: SharedStage) -> dict[str, SharedStage]:
    """Everything a stage was made from, by name, each after what it reads."""
    found: dict[str, SharedStage] = {}
    for source in stage.sources:
        found |= ancestors(source)
        found[source.name] = source
    return found


def made_from(recipe: Recipe, ref: StageRef) -> list[StageRef]:
    """A stage of a recipe's chain and all that could not be without it."""
    found: list[StageRef] = []
    for planned in plan_chain(recipe):
        if planned.ref == ref or any(source in found for source in planned.inputs.values()):
            found.append(planned.ref)
    return found


def _shared(recipe: Recipe, planned: PlannedStage, chain: Chain) -> SharedStage:
    stage = planned.ref.stage
    inputs = {
        role: chain[source] if isinstance(source, StageRef) else source for role, source in planned.inputs.items()
    }
    iteration = planned.ref.iteration if reads_iteration(stage, recipe) else 0
    read = what_is_read(recipe, stage, inputs)
    made_of = {
        "stage": stage,
        "iteration": iteration,
        "recipe": recipe_digest(read),
        "inputs": [[role, _identity(source)] for role, source in inputs.items()],  # their order tells evaluate the last
        **dict(_left_for_others(recipe, stage)),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return SharedStage(stage, iteration, read, inputs, digest)


def _left_for_others(recipe: Recipe, stage: str) -> Iterator[tuple[str, Any]]:
    """Keys that do not change a stage's numbers, and so may change within a run, but decide what the stage leaves."""
    if stage == "anneal" and recipe.evaluate.along:
        yield "checkpoints", [recipe.flywheel.keep_checkpoints, recipe.anneal.checkpoint_interval]
    if stage == "evaluate" and recipe.evaluate.lm_eval.enabled:
        yield "lm_eval", recipe.evaluate.lm_eval.model_dump(mode="json")


def _identity(source: SharedStage | Path) -> str:
    """A stage's digest, or that of an outside folder's manifest, as nemo_rmt.flywheel_run has it."""
    if isinstance(source, SharedStage):
        return source.digest
    try:
        return hashlib.sha256((source / METADATA).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{source} is neither a checkpoint nor a cache of log-probabilities: {error}") from None
