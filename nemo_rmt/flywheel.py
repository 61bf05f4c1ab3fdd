"""The flywheel's commands: run a recipe's whole chain, or one stage of it, and report."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from nemo_rmt import preflight
from nemo_rmt.chain import StageRef, plan_chain
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import STOPPED
from nemo_rmt.flywheel_run import FlywheelRun
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.node import take_part
from nemo_rmt.launch.ranks import worker_command
from nemo_rmt.launch.stage import Command
from nemo_rmt.overview import print_chain, print_summary
from nemo_rmt.run_folder import RunFolder

__all__ = ["find_stage", "run_flywheel", "run_one_stage"]

logger = logging.getLogger(__name__)


def run_flywheel(recipe: Recipe, *, dry_run: bool = False, command: Command = worker_command) -> int:
    """Run, or continue, every stage of the recipe in its run folder.

    Returns 0 when all are done, 1 when a stage failed, 2 when a stage refused its input, 75 when it stopped on request
    and 128 plus the signal's number when interrupted. Raises UserError for wrong input, before anything is started. On
    several nodes this is called on each, by srun; those that do not lead return 0 when it is over.
    dry_run: check everything, print the resolved chain and what of it is done, start nothing.
    """
    run = RunFolder(Path(recipe.run_dir))
    if dry_run:
        preflight.check(recipe, run, here=recipe.cluster.nodes == 1)
        flywheel = FlywheelRun(recipe, run)
        print_chain(recipe, run, {ref for ref in flywheel.chain if flywheel.is_done(ref)})
        return 0
    return _locked(recipe, run, command, None)


def run_one_stage(
    recipe: Recipe, stage: str, iteration: int, *, download: bool = False, command: Command = worker_command
) -> int:
    """Run, or continue, one stage of the chain, whose inputs must be done. Returns as run_flywheel does.

    download: the data stage may fetch what the recipe names from the Hugging Face hub.
    """
    target = find_stage(recipe, stage, iteration)
    return _locked(recipe, RunFolder(Path(recipe.run_dir)), command, target, download=download)


def find_stage(recipe: Recipe, stage: str, iteration: int) -> StageRef:
    """A stage of the recipe's chain. Raises UserError when it has none of that name in that iteration."""
    chain = [planned.ref for planned in plan_chain(recipe)]
    if (target := StageRef(iteration, stage)) not in chain:
        raise UserError(
            f"the recipe has no stage {stage} in iteration {iteration}; it has: {', '.join(map(str, chain))}"
        )
    return target


def _locked(recipe: Recipe, run: RunFolder, command: Command, only: StageRef | None, *, download: bool = False) -> int:
    """Check, lock, run all stages or one, report; where another node leads, follow it."""

    def lead(meeting: Meeting) -> int:
        preflight.check(recipe, run, download=download)
        with run.lock() as lock:
            flywheel = FlywheelRun(recipe, run, command, lock, meeting)  # reads the state, which nobody else writes now
            if only is not None:
                return flywheel.run_only(only)
            status = flywheel.run_all()
            if status == STOPPED:
                return status
            if flywheel.started or not run.report_path.exists():
                status = _write_report(run) or status
        print_summary(recipe, run)
        return status

    one_process = only is not None and only.stage == "data"
    check = functools.partial(preflight.check_machine, recipe)
    return take_part(run.path, recipe, command, lead=lead, check=check, anywhere=one_process)


def _write_report(run: RunFolder) -> int:
    """Write the report; 1 if that failed. The stages' results are safe either way, so the reason is only told."""
    from nemo_rmt.report import write_report  # plotting libraries take a second to load

    try:
        write_report(run.path)
    except Exception:
        logger.exception(
            "the report could not be written; the run itself is safe, retry with: nemo-rmt report %s", run.path
        )
        return 1
    return 0
