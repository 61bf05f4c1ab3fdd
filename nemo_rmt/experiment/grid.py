"""Every arm with every seed, and the stages they need together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_rmt.chain import StageRef
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.experiment.compute import equal_flops_steps, made
from nemo_rmt.experiment.config import Experiment, arm_recipe
from nemo_rmt.experiment.shared import Chain, SharedStage, made_from, shared_chain, stretched, with_steps
from nemo_rmt.experiment.store import StageStore


@dataclass(eq=False)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    recipe: Recipe
    """The arm's; its ``stretched`` stage may get other steps."""
    matches: str | None
    """The arm whose FLOPs it is to cost, until the steps for that are known."""
    chain: Chain = field(init=False)
    """All its stages; while ``matches`` is set, those of ``open`` only stand for what they will be."""
    run_recipe: Recipe = field(init=False)
    """Of its run folder: the arm's, with the steps that its last iteration takes."""

    def __post_init__(self) -> None:
        self.chain, self.run_recipe = shared_chain(self.recipe), self.recipe

    def settle(self, steps: int) -> None:
        """Take that many steps for the ``stretched`` stage: nothing is open any more."""
        self.chain, self.run_recipe = shared_chain(self.recipe, steps), with_steps(self.recipe, steps)
        self.matches = None

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.recipe.run_dir)

    @property
    def open(self) -> list[StageRef]:
        """The stages that are not known yet."""
        return [] if self.matches is None else made_from(self.recipe, stretched(self.recipe))

    @property
    def known(self) -> Chain:
        """The stages that can be worked on."""
        waiting = self.open
        return {ref: stage for ref, stage in self.chain.items() if ref not in waiting}


@dataclass(frozen=True)
class Needed:
    """A stage and who needs it."""

    stage: SharedStage
    users: list[tuple[Cell, StageRef]]

    def __str__(self) -> str:
        """``seed 1, remit and 2 more: iteration 1 anneal``."""
        cell, ref = self.users[0]
        arms = list(dict.fromkeys(user.arm for user, _ in self.users))
        more = f" and {len(arms) - 1} more" if len(arms) > 1 else ""
        return f"seed {cell.seed}, {arms[0]}{more}: {ref}"


class Grid:
    """An experiment's arms and seeds.

    Args:
        experiment: what to run. overrides: ``key=value`` of every arm's recipe. folder: of the arms' run folders.

    Raises UserError for an arm whose recipe cannot be.
    """

    def __init__(self, experiment: Experiment, overrides: list[str], folder: Path):
        self.experiment = experiment
        self.cells = [
            Cell(
                arm, seed, arm_recipe(experiment, arm, seed, overrides, folder / arm / f"seed_{seed}"), each.equal_flops
            )
            for seed in experiment.seeds
            for arm, each in experiment.arms.items()
        ]
        for cell in self.cells:
            self._require_stretchable(cell)

    def cell(self, arm: str, seed: int) -> Cell:
        """An arm with a seed."""
        return next(cell for cell in self.cells if (cell.arm, cell.seed) == (arm, seed))

    def _require_stretchable(self, cell: Cell) -> None:
        """Refuse to match the FLOPs of an arm by steps of a stage that is not there, or of unknown cost."""
        if cell.matches is None:
            return
        ref, other = stretched(cell.recipe), self.cell(cell.matches, cell.seed)
        if ref not in cell.chain:
            raise UserError(
                f"arm {cell.arm}: equal_flops is reached with steps of the anneal, and anneal.enabled=false"
            )
        rmt = other.recipe.rmt
        if ref.stage == "rmt" and not (ref in other.chain and rmt.enabled and rmt.objective == "rmt"):
            raise UserError(
                f"arm {cell.arm}: with rmt.objective=ntp equal_flops must be an arm with rmt.objective=rmt and as many "
                f"iterations, which tells how long the documents of a step are; {cell.matches} is none"
            )

    def needed(self) -> dict[str, Needed]:
        """The stages that are known, each once, by name: those of the first seed first, and each after its inputs."""
        found: dict[str, Needed] = {}
        for cell in self.cells:
            for ref, stage in cell.known.items():
                found.setdefault(stage.name, Needed(stage, [])).users.append((cell, ref))
        return found

    def open(self) -> list[tuple[Cell, StageRef]]:
        """Stages that wait until it is known what another arm cost."""
        return [(cell, ref) for cell in self.cells for ref in cell.open]

    def settle(self, store: StageStore, done: set[str]) -> list[Cell]:
        """Find the steps of arms that are to cost what another did, where that is ``done``, by names of stages; returns
        those whose steps have been found now."""
        settled = []
        for cell in self.cells:
            if cell.matches is None:
                continue
            other = self.cell(cell.matches, cell.seed)
            before = [stage.name for stage in cell.known.values()]
            if other.matches is None and done.issuperset([*made(other.chain), *before]):
                cell.settle(equal_flops_steps(cell.recipe, cell.chain, other.chain, store.folder))
                settled.append(cell)
        return settled
