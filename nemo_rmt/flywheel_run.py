"""One run of a recipe's chain of stages, with durable state, one process group per stage.

A stage is skipped when its result is there and was made from what its inputs are now. Otherwise it
runs: from its last checkpoint when it was interrupted and its inputs are unchanged, from nothing when
an input was made again since. The state is written before and after every step, so that a kill at any
moment leaves a run that the next start continues.
"""

from __future__ import annotations

import hashlib
import sys
import time
import uuid
from pathlib import Path

from nemo_rmt import preflight, stopping
from nemo_rmt.chain import PlannedStage, StageRef, plan_chain, recipe_digest
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DISK_FULL, DONE, FAILED, STOPPED, WRONG_INPUT
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.placement import Placement
from nemo_rmt.launch.ranks import worker_command
from nemo_rmt.launch.stage import Command, Outcome, run_alone, run_stage
from nemo_rmt.manifest import METADATA, inspect_checkpoint, latest_step
from nemo_rmt.process import Interrupted
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import RunFolder, StageRecord, State, write_text
from nemo_rmt.stages.job import StageJob


class FlywheelRun:
    """One start of a run, or only a look at it.

    Args:
        command: of each rank.
        lock: file descriptor of the run's lock, which the ranks inherit; -1: nothing will be started.
        meeting: of the nodes; None: this one alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        command: Command = worker_command,
        lock: int = -1,
        meeting: Meeting | None = None,
    ):
        self.recipe = recipe
        self.run = run
        self.command = command
        self.lock = lock
        self.meeting = meeting or Meeting(run.path, Placement())
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
            if self.is_done(planned.ref):
                continue
            if stopping.requested():
                return STOPPED
            if status := self.run_stage(planned):
                return status
            if planned.ref.stage == "data":  # what else is from outside has been looked at before
                preflight.check_reference(self.recipe, self.folder(planned.ref))
        return DONE

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
        """Whether a stage's result is there, and was made from its inputs as they are now, all done too.

        An evaluation that lm-eval has no part in yet is not done, once the recipe asks for it.
        """
        record, result = self.state.record(ref.iteration, ref.stage), self.run.result(ref.iteration, ref.stage)
        if record.status != "done" or result is None:
            return False
        if ref.stage == "evaluate" and self.recipe.evaluate.lm_eval.enabled:
            if not any(name.startswith("lm_eval/") for name in result["metrics"]):
                return False
        sources = [source for source in self.chain[ref].inputs.values() if isinstance(source, StageRef)]
        return all(map(self.is_done, sources)) and record.inputs == self.input_ids(self.chain[ref])

    def input_ids(self, planned: PlannedStage) -> dict[str, str]:
        """Identity of each input by role: the stage's present run, or a digest of an outside folder's manifest."""
        ids = {}
        for role, source in planned.inputs.items():
            if isinstance(source, StageRef):
                ids[role] = self.state.record(source.iteration, source.stage).id or ""
            else:
                ids[role] = hashlib.sha256((source / METADATA).read_bytes()).hexdigest()
        return ids

    def run_stage(self, planned: PlannedStage) -> int:
        """Run one stage from its last checkpoint, or from nothing when its inputs changed; 0 when it is done.

        A stage whose ranks died, hung or crashed is started again, ``flywheel.restarts`` times in a row at most
        without a new checkpoint.
        """
        ref, ids = planned.ref, self.input_ids(planned)
        record = self.state.record(ref.iteration, ref.stage)
        job = self.job(planned)
        resumes = record.id is not None and record.status != "done" and record.inputs == ids
        if not resumes:
            self.run.discard(ref.iteration, ref.stage)
            record.id, record.inputs, record.attempts, record.started = uuid.uuid4().hex, ids, 0, time.time()
        attended = not self.meeting.placement.requeued
        while True:
            if not attended and self.given_up(ref, record):
                return self.end(ref, record, "failed", FAILED)
            record.begin(latest_step(self.folder(ref)), attended=attended)
            self.run.save_state(self.state)
            outcome = Outcome(DONE)
            if self.run.result(ref.iteration, ref.stage) is None:  # else: killed between its end and our note of it
                outcome = self.work(job, ref, record)
            if outcome.status == DONE and (result := self.run.result(ref.iteration, ref.stage)) is not None:
                record.checkpoint = result.get("checkpoint")
                return self.end(ref, record, "done", DONE)
            if outcome.status == STOPPED or (outcome.status == FAILED and stopping.requested()):
                step = latest_step(self.folder(ref))
                print(f"nemo-rmt: {ref} stopped on request at step {step}; start it again to continue", file=sys.stderr)
                return self.end(ref, record, "pending", STOPPED)
            reason = outcome.reason or "exit status 0, but no result.json"
            if outcome.status != FAILED or not self.may_restart(ref, record):
                if outcome.status == DISK_FULL:
                    reason += f"; make room and start it again: {self.saved(ref)}"
                log = self.folder(ref) / "log" / f"rank_{outcome.rank}.log"
                print(f"nemo-rmt: {ref} failed: {reason}; {_where(log)}", file=sys.stderr)
                return self.end(ref, record, "failed", WRONG_INPUT if outcome.status == WRONG_INPUT else FAILED)
            print(f"nemo-rmt: {ref}: {reason}; starting it again: {self.saved(ref)}", file=sys.stderr, flush=True)
            attended = False

    def given_up(self, ref: StageRef, record: StageRecord) -> bool:
        """Whether a stage that nobody watches has saved nothing time after time."""
        restarts = self.recipe.flywheel.restarts
        fruitless = record.fruitless_before(latest_step(self.folder(ref)), attended=False)
        if fruitless <= restarts:
            return False
        whole = ref.stage in ("data", "evaluate")
        hint = "it is done in one go" if whole else f"or save more often ({ref.stage}.checkpoint_interval)"
        print(
            f"nemo-rmt: {ref} failed: {fruitless} starts in a row saved no new checkpoint "
            f"(flywheel.restarts={restarts}): {self.saved(ref)}. Give it more time, {hint}",
            file=sys.stderr,
        )
        return True

    def may_restart(self, ref: StageRef, record: StageRecord) -> bool:
        """Whether a stage that has just failed may be started again."""
        restarts = self.recipe.flywheel.restarts
        return restarts > 0 and record.fruitless_before(latest_step(self.folder(ref)), attended=False) <= restarts

    def end(self, ref: StageRef, record: StageRecord, word: str, status: int) -> int:
        """Write down how a stage ended; returns ``status``."""
        record.status = word
        record.finished = None if word == "pending" else time.time()
        self.run.save_state(self.state)
        return status

    def saved(self, ref: StageRef) -> str:
        """What a stage goes on from."""
        step = latest_step(self.folder(ref))
        return f"its last checkpoint is of step {step}" if step else "it has no checkpoint yet"

    def work(self, job: StageJob, ref: StageRef, record: StageRecord) -> Outcome:
        """Start the stage's ranks and wait for them."""
        stage_yaml = self.folder(ref) / "stage.yaml"
        job.save(stage_yaml)
        note, attempt = self.chain[ref].note, record.attempts
        print(f"{ref}" + (f" ({note})" if note else "") + (f", attempt {attempt}" if attempt > 1 else ""), flush=True)
        self.started += 1
        run = run_alone if ref.stage == "data" else run_stage
        try:
            return run(stage_yaml, self.recipe, self.command, self.meeting, self.lock)
        except (Interrupted, stopping.Stopped):
            self.end(ref, record, "pending", STOPPED)
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
        if ref.stage == "anneal" and not inputs.keys() & {"reference", "cache"}:
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


def _where(log: Path) -> str:
    return f"see {log}" if log.exists() else "it wrote no log: see its output above"
