"""The flywheel: runs a recipe's chain of stages with durable state, one process group per stage.

A stage is skipped when its result is there and was made from what its inputs are now. Otherwise it
runs: from its last checkpoint when it was interrupted and its inputs are unchanged, from nothing when
an input was made again since. The state is written before and after every step, so that a kill at any
moment leaves a run that the next start continues.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from nemo_rmt import preflight
from nemo_rmt.chain import PlannedStage, StageRef, plan_chain, recipe_digest
from nemo_rmt.config import Cluster, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.overview import print_chain, print_summary
from nemo_rmt.process import WRONG_INPUT, Interrupted, run_stage, signals_raise, worker_command
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import METADATA, RunFolder, State, inspect_checkpoint, write_text
from nemo_rmt.stages.job import StageJob

__all__ = ["FlywheelRun", "PlannedStage", "StageRef", "find_stage", "plan_chain", "run_flywheel", "run_one_stage"]

logger = logging.getLogger(__name__)

Command = Callable[[Path, Recipe], list[str]]
"""The command line of a stage, from its stage.yaml and the recipe."""


def run_flywheel(recipe: Recipe, *, dry_run: bool = False, command: Command = worker_command) -> int:
    """Run, or continue, every stage of the recipe in its run folder.

    Returns 0 when all are done, 1 when a stage failed, 2 when a stage refused its input, and 128 plus the
    signal's number when interrupted. Raises UserError for wrong input, before anything is started.
    dry_run: check everything, print the resolved chain and what of it is done, start nothing.
    """
    run = RunFolder(Path(recipe.run_dir))
    if dry_run:
        preflight.check(recipe, run)
        flywheel = FlywheelRun(recipe, run, command, lock=-1)  # only asked, never started
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
    """Check, lock, run all stages or one, report."""
    preflight.check(recipe, run, download=download)
    with run.lock() as lock:
        flywheel = FlywheelRun(recipe, run, command, lock)  # reads the state again, now that nobody else writes it
        try:
            with signals_raise():
                status = flywheel.run_all() if only is None else flywheel.run_only(only)
        except Interrupted as interrupted:
            print(f"nemo-rmt: stopped by {interrupted}; start it again to continue", file=sys.stderr)
            return 128 + interrupted.signum
        if only is not None:
            return status
        if flywheel.started or not run.report_path.exists():
            status = _write_report(run) or status
    print_summary(recipe, run)
    return status


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


class FlywheelRun:
    """One start of a run, holding its lock (``lock``: the file descriptor, which workers inherit)."""

    def __init__(self, recipe: Recipe, run: RunFolder, command: Command, lock: int):
        self.recipe = recipe
        self.run = run
        self.command = command
        self.lock = lock
        self.chain = {planned.ref: planned for planned in plan_chain(recipe)}
        self.started = 0
        self.state = preflight.check_state(recipe, run) or State(recipe_digest(recipe))
        for ref in self.chain:
            self.state.record(ref.iteration, ref.stage)

    def begin(self) -> None:
        """Write the resolved recipe and the state, which make the folder this recipe's."""
        write_text(self.run.recipe_path, resolved_yaml(self.recipe, comments=True))
        self.run.save_state(self.state)

    def run_all(self) -> int:
        """Run what is not done, in order, until one fails."""
        self.begin()
        for planned in self.chain.values():
            if not self.is_done(planned.ref) and (status := self.run_stage(planned)):
                return status
        return 0

    def run_only(self, ref: StageRef) -> int:
        """Run one stage if it is not done. Raises UserError when an input of it is not done."""
        if self.is_done(ref):
            print(f"{ref} is done; delete {self.folder(ref)} to run it again")
            return 0
        self.require_inputs(ref)
        self.begin()
        return self.run_stage(self.chain[ref])

    def require_inputs(self, ref: StageRef) -> None:
        """Raise UserError when an input of a stage is not done."""
        missing = [
            str(source)
            for source in self.chain[ref].inputs.values()
            if isinstance(source, StageRef) and not self.is_done(source)
        ]
        if missing:
            raise UserError(
                f"{ref} needs stages that are not done: {', '.join(missing)}. Run those first, or nemo-rmt flywheel"
            )

    def folder(self, ref: StageRef) -> Path:
        """The stage's folder."""
        return self.run.stage_dir(ref.iteration, ref.stage)

    def is_done(self, ref: StageRef) -> bool:
        """Whether a stage's result is there, and was made from its inputs as they are now, all done too."""
        record = self.state.record(ref.iteration, ref.stage)
        if record.status != "done" or self.run.result(ref.iteration, ref.stage) is None:
            return False
        sources = [source for source in self.chain[ref].inputs.values() if isinstance(source, StageRef)]
        return all(map(self.is_done, sources)) and record.inputs == self.input_ids(self.chain[ref])

    def input_ids(self, planned: PlannedStage) -> dict[str, str]:
        """Identity of each input by role: the stage's present run, or a digest of an outside checkpoint."""
        ids = {}
        for role, source in planned.inputs.items():
            if isinstance(source, StageRef):
                ids[role] = self.state.record(source.iteration, source.stage).id or ""
            else:
                ids[role] = hashlib.sha256((source / METADATA).read_bytes()).hexdigest()
        return ids

    def run_stage(self, planned: PlannedStage) -> int:
        """Run one stage from its last checkpoint, or from nothing when its inputs changed; 0 when it is done."""
        ref, ids = planned.ref, self.input_ids(planned)
        record = self.state.record(ref.iteration, ref.stage)
        job = self.job(planned)
        resumes = record.id is not None and record.status != "done" and record.inputs == ids
        if not resumes:
            self.run.discard(ref.iteration, ref.stage)
            record.id, record.inputs, record.attempts, record.started = uuid.uuid4().hex, ids, 0, time.time()
        record.status, record.checkpoint, record.finished = "running", None, None
        record.attempts += 1
        self.run.save_state(self.state)
        status = 0
        if self.run.result(ref.iteration, ref.stage) is None:  # else: killed between the stage's end and our note of it
            status = self.work(job, ref, record.attempts)
        result = self.run.result(ref.iteration, ref.stage)
        record.finished = time.time()
        if status or result is None:
            record.status = "failed"
            self.run.save_state(self.state)
            log = self.folder(ref) / "log" / "rank_0.log"
            print(f"nemo-rmt: {ref} failed ({_reason(status)}); {_where(log)}", file=sys.stderr)
            return WRONG_INPUT if status == WRONG_INPUT else 1
        record.status, record.checkpoint = "done", result.get("checkpoint")
        self.run.save_state(self.state)
        return 0

    def work(self, job: StageJob, ref: StageRef, attempt: int) -> int:
        """Start the stage's process and wait for it; returns its exit status."""
        stage_yaml = self.folder(ref) / "stage.yaml"
        job.save(stage_yaml)
        note = self.chain[ref].note
        print(f"{ref}" + (f" ({note})" if note else "") + (f", attempt {attempt}" if attempt > 1 else ""), flush=True)
        self.started += 1
        recipe = self.recipe
        if ref.stage == "data":  # one process writes files, wherever the others are to train
            recipe = recipe.model_copy(update={"cluster": Cluster(threads=recipe.cluster.threads)})
        try:
            return run_stage(stage_yaml, self.command(stage_yaml, recipe), recipe, self.lock)
        except Interrupted:
            self.state.record(ref.iteration, ref.stage).status = "pending"
            self.run.save_state(self.state)
            raise

    def job(self, planned: PlannedStage) -> StageJob:
        """The stage's job. Raises UserError when the checkpoint of an input is no longer whole."""
        ref, inputs = planned.ref, {}
        for role, source in planned.inputs.items():
            if not isinstance(source, StageRef):
                inputs[role] = str(source)
            elif source.stage == "data":
                inputs[role] = self.run.relative(self.folder(source))
            else:
                inputs[role] = self.checkpoint(source)
        recipe = self.recipe
        if ref.stage == "anneal" and "reference" not in inputs:
            # Iteration 0 has no RL model yet. Its stage.yaml says so: without a reference ReMiT is refused.
            recipe = recipe.model_copy(update={"anneal": recipe.anneal.model_copy(update={"objective": "uniform"})})
        return StageJob(stage=ref.stage, iteration=ref.iteration, inputs=inputs, recipe=recipe)

    def checkpoint(self, ref: StageRef) -> str:
        """A finished stage's checkpoint relative to the run, after checking that it is whole."""
        checkpoint = self.state.record(ref.iteration, ref.stage).checkpoint
        try:
            if checkpoint is None:
                raise UserError(f"{ref} left no checkpoint")
            inspect_checkpoint(self.run.path / checkpoint)
        except UserError as error:
            raise UserError(f"{error}; delete {self.folder(ref)} to make it again") from error
        return checkpoint


def _reason(status: int) -> str:
    if status == 0:
        return "exit status 0, but no result.json"
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"exit status {status}"


def _where(log: Path) -> str:
    return f"see {log}" if log.exists() else "it wrote no log: see its output above"
