"""The folder of shared stages: what of them is done, who works on which.

``OUT/stages/NAME/`` is a stage's folder as in a run. Beside what the stage writes it has record.json, what state.json
would say about it, and .lock, held by whoever works on it and by the processes they started: it is free once all of
them have ended, however they did.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_rmt.errors import UserError
from nemo_rmt.experiment.config import STAGES
from nemo_rmt.experiment.reads import runnable
from nemo_rmt.experiment.shared import SharedStage
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.run_folder import StageRecord, write_json
from nemo_rmt.stages.job import StageJob


class StageStore:
    """The shared stages in an output folder.

    Args:
        out: the folder, of one experiment or of many. threads: CPU threads of each process where a recipe does not say.
    """

    def __init__(self, out: Path, threads: int):
        self.out = out.resolve()
        self.threads = threads
        self.began = 0.0
        """When this start began, by the clock of the file system, which all workers share."""

    def begin(self) -> None:
        """Note when this start began. Failures from before it may be tried again."""
        stages = self.out / STAGES
        stages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=stages) as probe:
            probe.write(b"0")
            probe.flush()
            self.began = os.fstat(probe.fileno()).st_mtime

    def folder(self, stage: SharedStage) -> Path:
        """A stage's folder."""
        return self.out / STAGES / stage.name

    def result(self, stage: SharedStage) -> dict[str, Any] | None:
        """result.json of a stage that is done."""
        result = _read(self.folder(stage) / "result.json")
        return result if result is not None and result.get("status") == "done" else None

    def is_done(self, stage: SharedStage) -> bool:
        """Whether a stage's result is there."""
        return self.result(stage) is not None

    def has_failed(self, stage: SharedStage) -> bool:
        """Whether a stage has failed since this start began, here or elsewhere."""
        try:
            written = (self.folder(stage) / "record.json").stat().st_mtime
        except OSError:
            return False
        return written >= self.began and self.record(stage).status == "failed"

    def record(self, stage: SharedStage) -> StageRecord:
        """What is known about a stage. A result counts, also one that nobody could note any more."""
        folder, raw = self.folder(stage), _read(self.folder(stage) / "record.json")
        record = StageRecord(**raw) if raw is not None else StageRecord()
        record.id, record.inputs = stage.digest, stage.input_ids()
        if (result := self.result(stage)) is not None:
            record.checkpoint = result["checkpoint"]
            if record.status != "done":
                record.status, record.finished = "done", (folder / "result.json").stat().st_mtime
        return record

    def save_record(self, stage: SharedStage, record: StageRecord) -> None:
        """Write record.json. The stage's lock must be held."""
        write_json(self.folder(stage) / "record.json", asdict(record))

    def try_lock(self, stage: SharedStage) -> int | None:
        """The file descriptor of the stage's lock, which the holder closes; None while another has it."""
        folder = self.folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def write_job(self, stage: SharedStage) -> Path:
        """Write a stage's stage.yaml, whose inputs must be done. Raises UserError when one is no longer whole."""
        inputs = {}
        for role, source in stage.inputs.items():
            if isinstance(source, Path):
                inputs[role] = str(source)
            elif source.stage == "data":
                inputs[role] = f"{STAGES}/{source.name}"
            else:
                inputs[role] = self._checkpoint(source)
        recipe = runnable(stage.recipe, stage.stage)
        if recipe.cluster.threads is None:
            recipe.cluster.threads = self.threads
        path = self.folder(stage) / "stage.yaml"
        StageJob(stage=stage.stage, iteration=stage.iteration, run_dir="../..", inputs=inputs, recipe=recipe).save(path)
        return path

    def _checkpoint(self, stage: SharedStage) -> str:
        """A finished stage's checkpoint relative to the output folder."""
        checkpoint = (self.result(stage) or {}).get("checkpoint")
        try:
            if checkpoint is None:
                raise UserError(f"{stage.name} left no checkpoint")
            inspect_checkpoint(self.out / checkpoint)
        except UserError as error:
            raise UserError(f"{error}; delete {self.folder(stage)} to make it again") from error
        return checkpoint


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where it is not there or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
