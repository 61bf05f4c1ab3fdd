"""Which stages a recipe asks for, in order, and what each one reads. Pure: nothing here touches the disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_rmt.config import EARLIER_MODELS, CachedReference, Recipe
from nemo_rmt.recipe_io import changed_keys, describe_change

MAY_CHANGE = (
    "name", "run_dir", "iterations", "cluster.*", "tracking.*", "parallel.tensor", "parallel.pipeline",
    "parallel.virtual_pipeline", "parallel.context", "parallel.sequence", "parallel.overlap", "parallel.recompute",
    "flywheel.ends_with", "flywheel.keep_checkpoints", "flywheel.async_save", "flywheel.restarts",
    "*.checkpoint_interval", "*.micro_batch_size", "*.optim.max_skipped", "anneal.*.offload",
    "model.logprob_chunk", "rollout.mismatch_*", "rollout.vllm.*", "evaluate.lm_eval.*",
)  # fmt: skip
"""Keys that do not decide a run's results: another start of the same run may give them other values."""

ITERATION = ("anneal", "rmt", "sft", "rl")
"""The stages of one turn that make models, in order."""


@dataclass(frozen=True)
class StageRef:
    """One stage of one turn of the flywheel."""

    iteration: int
    stage: str

    def __str__(self) -> str:
        return f"iteration {self.iteration} {self.stage}"


@dataclass(frozen=True)
class PlannedStage:
    """A stage and its inputs by role: another stage of the chain, or from outside a checkpoint folder or a cache of
    log-probabilities, which have a manifest.json each."""

    ref: StageRef
    inputs: dict[str, StageRef | Path] = field(default_factory=dict)
    note: str = ""
    """For people: what is special about it."""


def plan_chain(recipe: Recipe) -> list[PlannedStage]:
    """Every stage of every iteration in the order they run.

    Iteration 0 builds the data, pre-trains (unless pretrain.checkpoint is given) and anneals uniformly,
    because there is no RL model yet (unless its reference is a checkpoint or a cache). Later iterations anneal
    the pre-training checkpoint afresh, or the last base (flywheel.start_from: previous). Stages that are not
    enabled are left out: the next one starts from what the last one before it made. The last iteration may end early
    (flywheel.ends_with).
    """
    data = StageRef(0, "data")
    stable: StageRef | Path = StageRef(0, "pretrain")
    chain = [PlannedStage(data)]
    if recipe.pretrain.checkpoint is None:
        chain.append(PlannedStage(stable, {"data": data}))
    else:
        stable = Path(recipe.pretrain.checkpoint).absolute()
    base = stable
    for iteration in range(recipe.iterations):
        if recipe.flywheel.start_from == "stable":
            base = stable
        measured: dict[str, StageRef | Path] = {"data": data}
        if not recipe.anneal.enabled or (iteration == 0 and isinstance(stable, StageRef)):
            measured["pretrain"] = stable
        latest = base
        last = recipe.flywheel.ends_with if iteration == recipe.iterations - 1 else ITERATION[-1]
        for stage in ITERATION[: ITERATION.index(last) + 1]:
            if not getattr(recipe, stage).enabled:
                continue
            inputs: dict[str, StageRef | Path] = {"data": data, "checkpoint": latest}
            note = ""
            if stage == "anneal":
                note = "uniform"
                if recipe.anneal.guide is not None:
                    source, note = _reference(recipe, iteration)
                    inputs |= source
            latest = measured[stage] = StageRef(iteration, stage)
            if stage in ("anneal", "rmt"):
                base = latest
            chain.append(PlannedStage(latest, inputs, note))
        chain.append(PlannedStage(StageRef(iteration, "evaluate"), measured))
    return chain


def _reference(recipe: Recipe, iteration: int) -> tuple[dict[str, StageRef | Path], str]:
    """What guides an anneal, by role, and the note that says so: nothing when there is no RL model yet."""
    objective, reference = recipe.anneal.objective, recipe.anneal.guide.reference
    if isinstance(reference, CachedReference):
        return {"cache": Path(reference.cache).absolute()}, f"{objective} (cached)"
    if reference not in EARLIER_MODELS:
        return {"reference": Path(reference).absolute()}, objective
    made_by = EARLIER_MODELS[reference]
    if not iteration:
        return {}, f"uniform: no {made_by.upper()} model yet"
    return {"reference": StageRef(iteration - 1, made_by)}, objective + ("" if made_by == "rl" else " (SFT model)")


def fixed_differences(a: Recipe, b: Recipe) -> list[str]:
    """One line for each key that differs between two recipes and must not within one run."""
    return [describe_change(*change) for change in changed_keys(a, b) if not _may_change(change[0])]


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the keys that decide a run's results, as far as they differ from the defaults.

    Leaving defaults out lets a later version add keys without refusing the runs of an earlier one.
    """
    fixed = _without_changeable(recipe.model_dump(mode="json", exclude_defaults=True), "")
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _without_changeable(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    kept = {}
    for name, each in value.items():
        if not _may_change(prefix + name):
            inner = _without_changeable(each, f"{prefix}{name}.") if isinstance(each, dict) else each
            if inner != {}:  # a section of which only changeable keys were set
                kept[name] = inner
    return kept


def _may_change(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
