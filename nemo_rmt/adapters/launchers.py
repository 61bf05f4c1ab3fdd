"""Starting stages on this machine, or as a chain of Slurm jobs through nemo_run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nemo_run as run
from invoke.exceptions import UnexpectedExit

from nemo_rmt import flywheel, preflight
from nemo_rmt.adapters.executors import fit_slurm, resolve_executor
from nemo_rmt.chain import PlannedStage, StageRef, plan_chain
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.flywheel_run import FlywheelRun
from nemo_rmt.overview import print_chain, print_summary
from nemo_rmt.run_folder import RunFolder


@dataclass(frozen=True)
class Work:
    """What to run: a recipe's chain, or one stage of it."""

    recipe: Recipe
    only: StageRef | None = None
    download: bool = False
    """Whether the data stage may fetch what the recipe names from the Hugging Face hub."""

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.recipe.run_dir))

    def __str__(self) -> str:
        return f"{self.only or 'every stage'} of {self.recipe.name} in {self.run.path}"


class Launcher(Protocol):
    """Runs work somewhere. Both methods raise UserError for wrong input, before anything is started."""

    def show(self, work: Work, *, scripts: bool) -> None:
        """Check the work and print what start would do; ``scripts``: with the text of the jobs, if there are any."""

    def start(self, work: Work) -> int:
        """Run, or continue, the work; returns as run_flywheel does."""


class Local:
    """This machine: one stage after the other, each a process group of its own."""

    def show(self, work: Work, *, scripts: bool) -> None:
        """See Launcher."""
        if work.only is None:
            flywheel.run_flywheel(work.recipe, dry_run=True)
        else:
            preflight.check(work.recipe, work.run, download=work.download)
            print(work)

    def start(self, work: Work) -> int:
        """See Launcher."""
        if work.only is None:
            return flywheel.run_flywheel(work.recipe)
        return flywheel.run_one_stage(work.recipe, work.only.stage, work.only.iteration, download=work.download)


@dataclass(frozen=True)
class Slurm:
    """One Slurm job per stage, each after the success of the one before, submitted as one nemo_run experiment.

    A job runs ``nemo-rmt stage`` on the run folder, which every node has to see. All stages share that folder's state
    and its lock, so that they are a chain even where one does not read what the one before it made. Stages that are
    done get no job. The last job of a whole flywheel also writes the report.
    """

    executor: run.SlurmExecutor
    name: str | None = None
    """Name of the experiment; by default the recipe's."""
    detach: bool = False
    """Do not wait for the jobs."""
    tail_logs: bool = False
    """Print the jobs' logs while waiting."""

    def show(self, work: Work, *, scripts: bool) -> None:
        """See Launcher."""
        executor, planned = self._check(work)
        if work.only is None:
            pending = {each.ref for each in planned}
            print_chain(work.recipe, work.run, {each.ref for each in plan_chain(work.recipe)} - pending)
        else:
            print(work)
        names = [job_name(each.ref) for each in planned]
        print(f"Slurm jobs, each after the success of the one before: {', '.join(names) or 'none, everything is done'}")
        if scripts and planned:
            self._print_scripts(work, executor, planned)

    def start(self, work: Work) -> int:
        """See Launcher. Detached, 0 means that the jobs were submitted."""
        executor, planned = self._check(work)
        if not planned:
            print(f"{work}: everything is done")
            return 0
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on this machine's PATH: submit on a machine of the cluster")
        with work.run.lock() as lock:  # free again before the first job asks for it
            FlywheelRun(work.recipe, work.run, lock=lock).begin()
        with self._experiment(work) as experiment:
            _add_jobs(experiment, executor, work, planned)
            try:
                experiment.run(detach=self.detach, tail_logs=self.tail_logs)
            except UnexpectedExit as error:
                raise UserError(f"{error.result.command} failed: {' '.join(error.result.stderr.split())}") from None
        if self.detach:
            return 0
        print_summary(work.recipe, work.run)
        return 1 if _pending(work) else 0

    def _check(self, work: Work) -> tuple[run.SlurmExecutor, list[PlannedStage]]:
        """The jobs' executor, and the stages that need one."""
        preflight.check(work.recipe, work.run, download=work.download, here=False)
        return fit_slurm(self.executor, work.recipe), _pending(work)

    def _experiment(self, work: Work, folder: str | None = None) -> run.Experiment:
        title = re.sub(r"[^A-Za-z0-9.-]+", "-", self.name or work.recipe.name)  # becomes part of paths in scripts
        return run.Experiment(title, base_dir=folder)

    def _print_scripts(self, work: Work, executor: run.SlurmExecutor, planned: list[PlannedStage]) -> None:
        """What sbatch would be given, made in a temporary folder."""
        with tempfile.TemporaryDirectory() as folder, self._experiment(work, folder) as experiment:
            _add_jobs(experiment, executor, work, planned)
            experiment.dryrun(log=False, delete_exp_dir=False)
            for each in planned:
                (script,) = Path(folder).rglob(f"{job_name(each.ref)}_sbatch.sh")
                print(f"\n# {script.name}\n{script.read_text()}")


def choose_launcher(executor: str | None, settings: list[str], **slurm_options: Any) -> Launcher:
    """The launcher for ``--executor``, or the words ``executor=NAME`` and ``executor.key=value``.

    slurm_options: fields of Slurm. Raises UserError for a wrong executor, and options that it does not take.
    """
    names = [executor] if executor else []
    names += [word.removeprefix("executor=") for word in settings if word.startswith("executor=")]
    if len(names) > 1:
        raise UserError(f"one executor expected, got {', '.join(names)}")
    changes = [word.removeprefix("executor.") for word in settings if word.startswith("executor.")]
    if names and names != ["local"]:
        chosen = resolve_executor(names[0], changes)
        if not isinstance(chosen, run.SlurmExecutor):
            raise UserError(
                f"executor {names[0]} is a {type(chosen).__name__}: give local, slurm, or a SlurmExecutor of yours"
            )
        return Slurm(chosen, **slurm_options)
    given = [f"--{name.replace('_', '-')}" for name, value in slurm_options.items() if value]
    given += [f"executor.{change}" for change in changes]
    if given:
        raise UserError(
            f"{', '.join(given)}: for Slurm jobs only (--executor slurm); on this machine the recipe's cluster section "
            "and the environment decide"
        )
    return Local()


def job_name(ref: StageRef) -> str:
    """A stage's name in Slurm."""
    return f"{ref.stage}_{ref.iteration}"


def job_command(work: Work, ref: StageRef, executor: run.SlurmExecutor, *, report: bool) -> str:
    """One line of bash that runs a stage in the folder the job was submitted from, and then writes the report.

    srun runs it once on each node; the first of them writes the report.
    """
    program = "nemo-rmt" if executor.container_image else f"{shlex.quote(sys.executable)} -m nemo_rmt"
    recipe = f"--yaml {shlex.quote(str(work.run.recipe_path.absolute()))}"
    stage = f"stage {ref.stage} --iteration {ref.iteration}"
    lines = [f"cd {shlex.quote(os.getcwd())}", f"{program} {'data build' if work.download else stage} {recipe}"]
    if report:
        report_line = f"{program} report {shlex.quote(str(work.run.path.absolute()))}"
        lines.append(f'{{ [ "${{SLURM_NODEID:-0}}" != 0 ] || {report_line}; }}')
    # nemo_run 0.11.1 puts a folder of its own in the place of /nemo_run anywhere in a script without a container
    return " && ".join(lines).replace("/nemo_run", "/''nemo_run")


def _add_jobs(experiment: run.Experiment, executor: run.SlurmExecutor, work: Work, planned: list[PlannedStage]) -> None:
    previous: list[str] = []
    for each in planned:
        report = work.only is None and each is planned[-1]
        command = shlex.quote(job_command(work, each.ref, executor, report=report))
        script = run.Script(path="-c", args=[command], entrypoint="bash")
        previous = [experiment.add(script, executor, name=job_name(each.ref), dependencies=previous)]


def _pending(work: Work) -> list[PlannedStage]:
    """The stages that work needs and that are not done. Raises UserError when a single stage's inputs are not."""
    asked = FlywheelRun(work.recipe, work.run)
    if work.only is None:
        return [planned for planned in asked.chain.values() if not asked.is_done(planned.ref)]
    if asked.is_done(work.only):
        return []
    asked.require_inputs(work.only)
    return [asked.chain[work.only]]
