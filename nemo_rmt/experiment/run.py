"""``nemo-rmt experiment``: checks an experiment, works on it, and has its results written."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.table import Table

from nemo_rmt import preflight
from nemo_rmt.chain import fixed_differences
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DONE, FAILED
from nemo_rmt.experiment.config import Experiment, experiments_folder, load_experiment
from nemo_rmt.experiment.grid import Cell, Grid
from nemo_rmt.experiment.shared import stretched, with_steps
from nemo_rmt.experiment.store import StageStore
from nemo_rmt.experiment.views import measured
from nemo_rmt.experiment.worker import Command, Worker, stage_command
from nemo_rmt.launch.node import until_signalled
from nemo_rmt.overview import wide_console
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.run_folder import RunFolder, write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExperimentOptions:
    """What the command line says besides the experiment's name."""

    overrides: list[str]
    """``key=value`` of every arm's recipe."""
    out: Path
    """Folder of all experiments that share stages."""
    seeds: list[int] | None = None
    """Instead of the experiment's."""
    arms: list[str] | None = None
    """These, the control and those whose FLOPs they are to cost; None: all."""
    control: str | None = None
    """Instead of the experiment's."""
    jobs: int = 1
    """Stages side by side."""
    dry_run: bool = False
    """Print what there is to do, and start nothing."""


def list_experiments() -> int:
    """Print the experiments that have a name."""
    table = Table("experiment", "recipe", "arms", "seeds", "what")
    for path in sorted(experiments_folder().glob("*.yaml")):
        name, experiment = load_experiment(path.stem)
        about = experiment.about.splitlines()[0]
        table.add_row(name, experiment.recipe, str(len(experiment.arms)), str(len(experiment.seeds)), about)
    wide_console().print(table)
    return DONE


def run_experiment(name: str, options: ExperimentOptions, *, command: Command = stage_command) -> int:
    """Run, or continue, an experiment; any number of these may work on the same one at once.

    Returns 0 when all arms are done, 1 when a stage failed or the results could not be written, 75 when it stopped on
    request and 128 plus the signal's number when interrupted. Raises UserError before anything is started.
    """
    name, experiment = load_experiment(name)
    experiment = experiment.chosen(options.seeds, options.arms, options.control)
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs} must be at least 1")
    folder = options.out.resolve() / name
    try:
        grid = Grid(experiment, options.overrides, folder)
        check(grid, folder)
    except UserError as error:
        raise UserError(f"experiment {name}: {error}") from None
    store = StageStore(options.out, _threads(grid, options.jobs))
    if options.dry_run:
        print_stages(name, grid, store)
        return DONE
    words = "".join(f"# Started with {word}\n" for word in options.overrides)
    values = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=10**6)
    write_text(folder / "experiment.yaml", words + values)
    results = Results(experiment, store, folder)
    status = until_signalled(Worker(grid, store, options.jobs, command, results.write).run)
    if status == DONE:
        print(f"Results: {folder / 'index.html'}")
    return status or (FAILED if results.failed else DONE)


def check(grid: Grid, folder: Path) -> None:
    """Raise UserError for whatever would make a stage fail later, and where the run folders are of other recipes."""
    for cell in grid.cells:
        run, recipe = RunFolder(cell.folder), cell.recipe
        if run.recipe_path.is_file():
            earlier = load_recipe(None, [run.recipe_path], [])
            if cell.matches is not None:
                # whatever steps it had, they follow from results
                recipe = cell.run_recipe = with_steps(recipe, getattr(earlier, stretched(recipe).stage).steps)
            if differences := fixed_differences(earlier, recipe):
                raise UserError(
                    f"{cell.folder} is of another recipe; these keys differ: {'; '.join(differences)}. Undo the "
                    f"change, choose another --out, or delete {folder}: its stages stay in {folder.parent / 'stages'}"
                )
        if cell.seed == grid.experiment.seeds[0]:
            try:
                preflight.check(recipe, run)
            except UserError as error:
                raise UserError(f"arm {cell.arm}: {error}") from None


def print_stages(name: str, grid: Grid, store: StageStore) -> None:
    """Every stage there is to do, once, with those who need it and whether it is done."""
    table = Table("seed", "stage", "arms", "state", "folder", title=f"{name} in {store.out}")
    grid.settle(store, {name for name, each in grid.needed().items() if store.is_done(each.stage)})
    needed, done = grid.needed(), 0
    for each in needed.values():
        (cell, ref), is_done = each.users[0], store.is_done(each.stage)
        done += is_done
        arms = ", ".join(dict.fromkeys(user.arm for user, _ in each.users))
        table.add_row(str(cell.seed), str(ref), arms, "done" if is_done else "to run", each.stage.name)
    for cell, ref in grid.open():
        table.add_row(str(cell.seed), str(ref), cell.arm, f"when {cell.matches} is done", "")
    console = wide_console()
    console.print(table)
    console.print(f"{done} of {len(needed) + len(grid.open())} stages are done.")


class Results:
    """Writes an experiment's results as its arms get done."""

    def __init__(self, experiment: Experiment, store: StageStore, folder: Path):
        self.experiment, self.store, self.folder = experiment, store, folder
        self.failed = False
        """Whether the last time went wrong. The stages' results are safe either way, so the reason is only told."""

    def write(self, whole: list[Cell]) -> None:
        """Write what these arms and seeds measured, all of whose stages are done."""
        from nemo_rmt.experiment.results import write_results  # plotting libraries take a second to load

        try:
            write_results(self.experiment, [measured(cell, self.store) for cell in whole], self.folder)
            self.failed = False
        except Exception:
            logger.exception("the results could not be written; the stages are safe, start it again to try again")
            self.failed = True


def _threads(grid: Grid, jobs: int) -> int:
    """CPU threads of each process, so that those of all jobs have the machine's cores together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (jobs * max(cell.recipe.cluster.gpus_per_node for cell in grid.cells)))
