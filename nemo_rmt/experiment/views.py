"""The arms' run folders: the shared stages of each arm and seed, linked to their places, with state.json.

``nemo-rmt status`` and ``nemo-rmt report`` read them as any run. Links are relative: the output folder can be moved.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from nemo_rmt.chain import StageRef, recipe_digest
from nemo_rmt.experiment.compute import chain_cost
from nemo_rmt.experiment.config import STAGES
from nemo_rmt.experiment.grid import Cell
from nemo_rmt.experiment.measured import Measured
from nemo_rmt.experiment.store import StageStore
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import RunFolder, State, write_text


def write_recipe(cell: Cell) -> None:
    """Write the recipe of an arm's run folder."""
    write_text(RunFolder(cell.folder).recipe_path, resolved_yaml(cell.run_recipe, comments=True))


def write_view(cell: Cell, store: StageStore) -> None:
    """Write all else of an arm's run folder, as far as its stages are."""
    run, state = RunFolder(cell.folder), State(recipe_digest(cell.run_recipe))
    _link(run.path / STAGES, store.out / STAGES)  # results name checkpoints as STAGES/...
    for ref, stage in cell.known.items():
        while len(state.iterations) <= ref.iteration:
            state.iterations.append({})
        state.iterations[ref.iteration][ref.stage] = store.record(stage)
        if store.folder(stage).is_dir():
            _link(run.stage_dir(ref.iteration, ref.stage), store.folder(stage))
    run.save_state(state)


def measured(cell: Cell, store: StageStore) -> Measured:
    """What came of an arm with a seed, all of whose stages are done."""
    metrics: dict[str, float] = {}
    for ref, stage in cell.chain.items():
        if ref.stage == "evaluate":
            found = _numbers(store.result(stage)["metrics"])
            metrics |= {f"iteration_{ref.iteration}/{name}": value for name, value in found.items()}
    cost = chain_cost(cell.chain, store.folder)
    return Measured(cell.arm, cell.seed, metrics, cost.tokens, cost.flops, _curves(cell, found), cell.folder)


def _curves(cell: Cell, found: dict[str, float]) -> dict[str, dict[int, float]]:
    """What the last iteration measured along its anneal, to its last step. found: its evaluate's metrics."""
    curves: dict[str, dict[int, float]] = {}
    for key, value in found.items():
        role, _, name = key.partition("/")
        if role.startswith("anneal@"):
            curves.setdefault(name, {})[int(role.removeprefix("anneal@"))] = value
    if not curves:
        return {}
    anneal = cell.chain[StageRef(cell.recipe.iterations - 1, "anneal")]
    final = "" if anneal is _final_model(cell) else "anneal/"
    for name, curve in curves.items():
        if f"{final}{name}" in found:
            curve[anneal.recipe.anneal.steps] = found[f"{final}{name}"]
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _final_model(cell: Cell) -> Any:
    """What evaluates under plain names: the last of its inputs."""
    return list(list(cell.chain.values())[-1].inputs.values())[-1]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _link(link: Path, target: Path) -> None:
    """Make a relative symbolic link, in place of another, atomically."""
    link.parent.mkdir(parents=True, exist_ok=True)
    text = os.path.relpath(target, link.parent.resolve())
    if link.is_symlink() and os.readlink(link) == text:
        return
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(text)
    os.replace(draft, link)
