"""Running a saved stage.yaml by itself, outside any flywheel."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_rmt.errors import UserError
from nemo_rmt.process import WRONG_INPUT, Interrupted, run_stage, signals_raise, worker_command
from nemo_rmt.run_folder import RunFolder, inspect_checkpoint
from nemo_rmt.stages.job import StageJob


def run_stage_file(path: Path) -> int:
    """Run the stage that ``path`` describes in the folder it lies in; returns the exit status as run_flywheel does.

    It continues from that folder's checkpoints. To run a finished stage afresh, copy its stage.yaml to a new
    folder beside it. Raises UserError for an unreadable file or inputs that are missing.
    """
    folder = path.resolve().parent
    job = StageJob.load(path)
    for role in job.inputs:
        source = job.input_folder(folder, role)
        if not source.is_dir():
            raise UserError(f"{path}: its input {role}={job.inputs[role]} is not there: {source}")
        if role != "data":
            inspect_checkpoint(source)
    if (folder / "result.json").exists():
        raise UserError(
            f"{folder} holds this stage's result already: copy stage.yaml to a new folder beside it to run it again"
        )
    with RunFolder((folder / job.run_dir).resolve()).lock() as lock:
        try:
            with signals_raise():
                status = run_stage(path.resolve(), worker_command(path.resolve(), job.recipe), job.recipe, lock)
        except Interrupted as interrupted:
            return 128 + interrupted.signum
    if status:
        print(f"nemo-rmt: {path} failed with exit status {status}", file=sys.stderr)
    return status if status in (0, WRONG_INPUT) else 1
