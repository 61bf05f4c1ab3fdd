"""What one stage process is told, and what it leaves behind. Imports no torch: the flywheel reads it too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

from nemo_rmt.config import Recipe, Section
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_io import validate
from nemo_rmt.run_folder import write_text

StageName = Literal["data", "pretrain", "anneal", "rmt", "sft", "rl", "evaluate", "score"]


class StageJob(Section):
    """The complete resolved configuration of one stage, as written to its stage.yaml."""

    stage: StageName
    """Which algorithm to run. ``score`` is no part of a chain: its folder is a cache of log-probabilities."""
    iteration: int
    """Turn of the flywheel, from 0."""
    run_dir: str = "../.."
    """The run folder, relative to the stage's folder (so that a copied run still works)."""
    inputs: dict[str, str] = {}
    """Folders the stage reads, by role, relative to the run folder or absolute. ``data``: the data stage's
    folder (all but the data stage). ``checkpoint``: where training starts, or what scores. ``reference``: ReMiT's RL
    model, or ``cache``: the folder of its log-probabilities. ``published``: a Hugging Face model that scores. The roles
    of evaluate other than ``data`` are stage names in chain order, the last being the iteration's final model."""
    recipe: Recipe
    """The flywheel's resolved recipe."""

    @classmethod
    def load(cls, path: Path) -> StageJob:
        """Read a stage.yaml. Raises UserError naming the file, and the key that is wrong."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        try:
            return validate(cls, values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write a stage.yaml that ``python -m nemo_rmt.stages`` runs alone."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    def input_folder(self, stage_dir: Path, role: str) -> Path | None:
        """The folder given for a role, or None. Relative ones are resolved against the run folder."""
        value = self.inputs.get(role)
        return None if value is None else (stage_dir / self.run_dir / value).resolve()
