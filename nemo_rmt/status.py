"""``nemo-rmt status``: how far every stage of a run is, for people and for scripts. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from nemo_rmt.chain import StageRef
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.flywheel_run import FlywheelRun
from nemo_rmt.manifest import METADATA
from nemo_rmt.overview import wide_console
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.run_folder import RunFolder
from nemo_rmt.tracking import SKIPPED, read_metrics


@dataclass(frozen=True)
class StageStatus:
    """What there is to say about one stage."""

    ref: StageRef
    status: str
    """pending, running, done, failed; outdated: done, but its inputs have changed since, so that it will run again."""
    attempts: int
    """Starts that led to what it has."""
    step: int | None
    """The last one it logged; None before the first, and for stages that take no steps."""
    steps: int | None
    """Steps it takes; None for stages that take none."""
    checkpoint: str
    """Name of the newest checkpoint, or empty. Its files are not looked at."""
    skipped: int
    """Optimizer steps that were skipped."""
    logged: float | None
    """Unix seconds of the last step it logged."""


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe that a run was started with. Raises UserError when the folder has no run."""
    run = RunFolder(folder)
    if not run.state_path.is_file() or not run.recipe_path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {run.state_path.name} with a {run.recipe_path.name}")
    recipe = load_recipe(None, [run.recipe_path], [])
    return recipe.model_copy(update={"run_dir": str(folder)})  # it may have been moved


def stage_statuses(recipe: Recipe) -> list[StageStatus]:
    """Every stage of the recipe's chain, in order. Raises UserError when its run_dir holds another recipe's run."""
    flywheel = FlywheelRun(recipe, RunFolder(Path(recipe.run_dir)))
    return [_status(flywheel, ref) for ref in flywheel.chain]


def print_plain(statuses: list[StageStatus]) -> None:
    """Iteration, stage and status of each, separated by tabs."""
    for each in statuses:
        print(each.ref.iteration, each.ref.stage, each.status, sep="\t")


def print_table(recipe: Recipe, statuses: list[StageStatus]) -> None:
    """A row per stage."""
    columns = ("stage", "status", "attempts", "step", "checkpoint", "skipped", "last logged")
    table = Table(*columns, title=f"{recipe.name} in {recipe.run_dir}")
    now = time.time()
    for each in statuses:
        table.add_row(
            str(each.ref),
            each.status,
            str(each.attempts or ""),
            "" if each.steps is None else f"{each.step or 0} / {each.steps}",
            each.checkpoint,
            str(each.skipped or ""),
            "" if each.logged is None else f"{ago(now - each.logged)} ago",
        )
    wide_console().print(table)


def ago(seconds: float) -> str:
    """``12 s``, ``5 min``, ``3.2 h`` or ``2.1 days``."""
    for unit, length, limit in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{max(0.0, seconds) / length:.{unit == 'h':d}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _status(flywheel: FlywheelRun, ref: StageRef) -> StageStatus:
    record = flywheel.state.record(ref.iteration, ref.stage)
    folder = flywheel.folder(ref)
    status = record.status
    if status == "done" and not _is_done(flywheel, ref):
        status = "outdated"
    last = (read_metrics(folder / "metrics.jsonl") or [{}])[-1]
    return StageStatus(
        ref=ref,
        status=status,
        attempts=record.attempts,
        step=last.get("step"),
        steps=getattr(getattr(flywheel.recipe, ref.stage, None), "steps", None),
        checkpoint=max((path.parent.name for path in folder.glob(f"checkpoints/step_*/{METADATA}")), default=""),
        skipped=len(read_metrics(folder / SKIPPED)),
        logged=last.get("time"),
    )


def _is_done(flywheel: FlywheelRun, ref: StageRef) -> bool:
    try:
        return flywheel.is_done(ref)
    except OSError:  # a checkpoint from outside is gone: starting the stage says so
        return False
