"""Running a saved stage.yaml by itself, outside any flywheel.

``python -m nemo_rmt.lone_stage STAGE.yaml DESCRIPTOR`` does it for a parent that holds the stage's lock: an open file,
by its number, which the stage's processes inherit.
"""

from __future__ import annotations

import functools
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from nemo_rmt import preflight
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DONE, FAILED, STOPPED, WRONG_INPUT
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.node import take_part
from nemo_rmt.launch.ranks import worker_command
from nemo_rmt.launch.stage import Outcome, run_alone, run_stage
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.run_folder import RunFolder
from nemo_rmt.stages.job import StageJob

NO_CHECKPOINT = ("data", "cache", "published")
"""Roles of inputs that are no checkpoints; the stage itself sees whether they are whole."""


def run_stage_file(path: Path, lock: int | None = None) -> int:
    """Run the stage that ``path`` describes in the folder it lies in; returns the exit status as run_flywheel does.

    It continues from that folder's checkpoints. To run a finished stage afresh, copy its stage.yaml to a new
    folder beside it. Raises UserError for an unreadable file or inputs that are missing.
    lock: file descriptor of a lock that the caller holds; None: the run's is taken.
    """
    folder = path.resolve().parent
    job = StageJob.load(path)
    for role in job.inputs:
        source = job.input_folder(folder, role)
        if not source.is_dir():
            raise UserError(f"{path}: its input {role}={job.inputs[role]} is not there: {source}")
        if role not in NO_CHECKPOINT:
            inspect_checkpoint(source)
    if (folder / "result.json").exists():
        raise UserError(
            f"{folder} holds this stage's result already: copy stage.yaml to a new folder beside it to run it again"
        )
    start = run_alone if job.stage == "data" else run_stage
    recipe, run = job.recipe, RunFolder((folder / job.run_dir).resolve())

    def lead(meeting: Meeting) -> int:
        with run.lock() if lock is None else nullcontext(lock) as held:
            outcome = start(path.resolve(), recipe, worker_command, meeting, held)
        return exit_status(outcome, str(path))

    check = functools.partial(preflight.check_machine, recipe)
    return take_part(run.path, recipe, worker_command, lead=lead, check=check, anywhere=job.stage == "data")


def exit_status(outcome: Outcome, name: str) -> int:
    """The exit status for how a stage's ranks ended, after saying why they failed. name: of the stage."""
    if outcome.status not in (DONE, STOPPED):
        print(f"nemo-rmt: {name} failed: {outcome.reason}", file=sys.stderr)
    return outcome.status if outcome.status in (DONE, STOPPED, WRONG_INPUT) else FAILED


def main(argv: list[str]) -> int:
    """Run one stage for a parent that holds its lock, and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run_stage_file(Path(argv[0]), int(argv[1]))
    except UserError as error:
        print(f"nemo-rmt: error: {error}", file=sys.stderr)
        return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
