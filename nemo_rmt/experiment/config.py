"""What an experiment is: arms, recipes that differ in something, the seeds they run with, and what is compared.

An experiment is a YAML file, ``recipes/experiments/NAME.yaml`` or any other.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from nemo_rmt.config import Recipe, Section
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_changes import merge
from nemo_rmt.recipe_io import load_recipe, read_yaml

STAGES = "stages"
"""Folder of the stages that all experiments of one output folder share; no experiment may be called so."""
_SET_HERE = {"seed": "seeds (or --seeds)", "run_dir": "--out"}
"""Keys of a recipe that the experiment itself decides, and by what."""


class Arm(Section):
    """One of the recipes that are compared."""

    about: str
    """What it is, for people."""
    settings: dict[str, Any] = {}
    """What differs from the experiment's recipe and settings: a partial recipe, its file, relative to this one, or a
    list of these, of which the later ones win."""
    equal_flops: str | None = None
    """Another arm. The last iteration's anneal gets as many steps, no fewer than its recipe has, as make the whole
    chain cost what that arm's cost with the same seed; with rmt.objective=ntp the last iteration's rmt gets them."""


class Metric(Section):
    """A figure to compare the arms by."""

    name: str = Field(pattern=r"^iteration_\d+/.+")
    """iteration_K/NAME, where NAME is one of iteration K's evaluate stage."""
    label: str
    """What it is called in tables and plots."""
    higher_is_better: bool
    """Which direction is an improvement."""
    curve: bool = False
    """Show it over the steps of the last anneal too (needs evaluate.along and flywheel.keep_checkpoints)."""


class Experiment(Section):
    """A grid of arms and seeds."""

    about: str
    """What is asked, for people; its first line is the title."""
    recipe: str
    """Name of the recipe that all arms begin with."""
    settings: dict[str, Any] = {}
    """What every arm changes in it, in the same forms."""
    seeds: list[NonNegativeInt] = Field(min_length=1)
    """Every arm runs once with each."""
    control: str
    """The arm that the others are compared with."""
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")], Arm] = Field(min_length=1)
    """The arms by name."""
    metrics: list[Metric] = Field(min_length=1)
    """What is compared."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.control not in self.arms:
            raise ValueError(f"control={self.control} is none of the arms: {', '.join(self.arms)}")
        for what, values in (("seeds", self.seeds), ("metrics", [metric.name for metric in self.metrics])):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{what} has {twice[0]} twice")
        for name in self.arms:
            self._require_end(name)
        own = {f"arms.{name}.settings": arm.settings for name, arm in self.arms.items()}
        for where, settings in {"settings": self.settings, **own}.items():
            for key in settings.keys() & _SET_HERE.keys():
                raise ValueError(f"{where}.{key}: an experiment's {key} comes from {_SET_HERE[key]}")
        return self

    def _require_end(self, name: str) -> None:
        """Refuse equal_flops that is no other arm, or leads back to where it began."""
        passed = [name]
        while (other := self.arms[passed[-1]].equal_flops) is not None:
            if other not in self.arms:
                raise ValueError(f"arms.{passed[-1]}.equal_flops={other} is none of the arms: {', '.join(self.arms)}")
            if other in passed:
                raise ValueError(f"arms.{name}.equal_flops leads back to itself: {' -> '.join([*passed, other])}")
            passed.append(other)

    def chosen(
        self, seeds: list[int] | None = None, arms: list[str] | None = None, control: str | None = None
    ) -> Experiment:
        """The same with other seeds, another control, or with these arms, the control, and those whose FLOPs they are
        to cost alone.

        Raises UserError for an arm that is not there and for a seed that is there twice.
        """
        control = self.control if control is None else control
        for option, names in {"--control": [control], "--arms": arms or []}.items():
            for name in names:
                if name not in self.arms:
                    raise UserError(f"{option}: {name!r} is none of the experiment's arms: {', '.join(self.arms)}")
        wanted = [control, *(self.arms if arms is None else arms)]
        for name in wanted:
            if (other := self.arms[name].equal_flops) is not None:
                wanted.append(other)
        kept = {name: arm for name, arm in self.arms.items() if name in wanted}
        try:
            changes = {"control": control, "arms": kept, "seeds": self.seeds if seeds is None else seeds}
            return Experiment(**{**self.model_dump(), **changes})
        except ValidationError as error:
            raise UserError(f"--seeds: {_described(error)}") from None


def experiments_folder() -> Path:
    """Where the experiments with a name are."""
    from nemo_rmt import recipes  # here: the recipes import the configuration

    return Path(recipes.__file__).parent / "experiments"


def load_experiment(name: str) -> tuple[str, Experiment]:
    """An experiment by name, or from a .yaml file; and the name of its folder. Raises UserError for what is wrong."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        path = experiments_folder() / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"unknown experiment {name!r}: {_nearest(name)}; a file of one ends in .yaml")
    values = read_yaml(path)
    if path.stem == STAGES:
        raise UserError(f"{path}: an experiment cannot be called {STAGES!r}, that folder is for what experiments share")
    arms = values.get("arms")
    for each in [values, *(arms.values() if isinstance(arms, dict) else [])]:
        if isinstance(each, dict) and isinstance(each.get("settings"), str | list):
            each["settings"] = _partial_recipe(each["settings"], path)
    try:
        return path.stem, Experiment.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_described(error)}") from None


def _partial_recipe(given: Any, path: Path) -> dict[str, Any]:
    """Settings of the experiment at ``path``: a mapping, a file's, or those of a list, of which the later ones win."""
    if isinstance(given, str):
        return read_yaml(path.parent / given)
    if isinstance(given, dict):
        return given
    if not isinstance(given, list):
        raise UserError(f"{path}: settings has {given!r}: expected a mapping of keys, or its file")
    merged: dict[str, Any] = {}
    for each in given:
        part = _partial_recipe(each, path)
        try:
            merge(merged, part)
        except UserError as error:
            raise UserError(f"{path}: settings: {error}") from None
    return merged


def arm_recipe(experiment: Experiment, arm: str, seed: int, overrides: list[str], run_dir: Path) -> Recipe:
    """The recipe of an arm with a seed: the experiment's, its settings, the arm's, then the command line's.

    Raises UserError, naming the arm, for a recipe that cannot be.
    """
    for word in overrides:
        for key, instead in _SET_HERE.items():
            if re.match(rf"{key}[*+]?=", word):
                raise UserError(f"{word}: an experiment's {key} comes from {instead}")
    words = [*as_words(experiment.settings), *as_words(experiment.arms[arm].settings), *overrides]
    try:
        recipe = load_recipe(experiment.recipe, [], [*words, f"seed={seed}", f"run_dir={run_dir}"])
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None
    if recipe.cluster.nodes > 1:
        raise UserError(f"arm {arm}: cluster.nodes={recipe.cluster.nodes}: an experiment's stages run on one node each")
    return recipe


def as_words(settings: dict[str, Any]) -> list[str]:
    """A partial recipe as ``section={...}`` words: JSON is YAML, and mappings merge into what is there."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in settings.items()]


def _described(error: ValidationError) -> str:
    """pydantic's errors in one line, with the nearest key for one that is unknown."""
    known = sorted({*Experiment.model_fields, *Arm.model_fields, *Metric.model_fields})
    lines = []
    for each in error.errors():
        key = ".".join(map(str, each["loc"]))
        if each["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(each["loc"][-1]), known, n=1)
            lines.append(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        elif each["type"] == "missing":
            lines.append(f"{key} is required")
        elif each["type"] == "value_error":
            lines.append(str(each["ctx"]["error"]))
        else:
            lines.append(f"{key}: {each['msg'].replace('Input should be', 'expected', 1)}")
    return "; ".join(lines)


def _nearest(name: str) -> str:
    names = sorted(path.stem for path in experiments_folder().glob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known experiments: {', '.join(names)}"
