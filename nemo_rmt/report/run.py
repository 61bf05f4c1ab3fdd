"""A run folder in memory: the recipe, and what each stage of each iteration left."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_rmt.errors import UserError
from nemo_rmt.tracking import read_metrics

CHAIN = ("data", "pretrain", "anneal", "rmt", "sft", "rl", "evaluate")
TRAINING = ("pretrain", "anneal", "rmt", "sft", "rl")
OPTIONAL = TRAINING[1:]
MEASURED = ("lm/", "tokens/", "tasks/")


@dataclass(frozen=True)
class StageRecord:
    """One stage of one iteration.

    folder: relative to the run. status: pending, running, done or failed as in state.json; "no result" for a stage
    that is done but has no readable result.json. result: result.json, {} unless done. steps: metrics.jsonl.
    planned_steps: of the recipe, None for data and evaluate. final_model: the iteration's last stage, whose figures
    evaluate's result.json gives without a prefix.
    """

    iteration: int
    name: str
    folder: str
    status: str = "pending"
    result: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    planned_steps: int | None = None
    final_model: str = "rl"

    @property
    def metrics(self) -> dict[str, float]:
        """result.json's metrics that are finite numbers; without a prefix are those of the RL model alone."""
        metrics = {k: float(v) for k, v in (self.result.get("metrics") or {}).items() if _is_number(v)}
        if self.name != "evaluate" or self.final_model == "rl":
            return metrics
        return {f"{self.final_model}/{k}" if _is_of_a_model(k) else k: v for k, v in metrics.items()}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was logged and finite."""
        points = [(record["step"], record[name]) for record in self.steps if _is_number(record.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def has_remit(self) -> bool:
        """Whether it was trained with ReMiT's weights."""
        return any("remit/weight_mean" in record for record in self.steps)

    @property
    def has_reasoning(self) -> bool:
        """Whether it was trained on sampled thoughts."""
        return any("rmt/match_rate" in record for record in self.steps)

    @property
    def is_rmt_baseline(self) -> bool:
        """Whether it was next-token prediction alone in RMT's place, by what it logged."""
        return self.name == "rmt" and bool(self.steps) and not self.has_reasoning


@dataclass(frozen=True)
class Run:
    """A run folder. recipe: flywheel.yaml, {} without it; stages: in chain order, planned ones included."""

    folder: Path
    recipe: dict[str, Any]
    stages: list[StageRecord]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder; raises UserError when there is none."""
        if not folder.is_dir():
            raise UserError(f"run_dir={folder} does not exist: give the folder of a run")
        if not (folder / "flywheel.yaml").exists() and not (folder / "state.json").exists():
            raise UserError(f"run_dir={folder} has neither flywheel.yaml nor state.json: give the folder of a run")
        recipe = _read_yaml(folder / "flywheel.yaml")
        states = read_json(folder / "state.json").get("iterations") or []
        count = max(len(states), int(recipe.get("iterations") or 0))
        stages = []
        for iteration in range(count):
            state = states[iteration] if iteration < len(states) else {}
            for name in CHAIN:
                if name in state or name in _planned(recipe, iteration):
                    stages.append(_load_stage(folder, recipe, iteration, name, state.get(name) or {}))
        return cls(folder, recipe, stages)

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.recipe.get("name") or "unnamed")

    @property
    def num_iterations(self) -> int:
        """Iterations planned or started."""
        return 1 + max((stage.iteration for stage in self.stages), default=-1)

    @cached_property
    def status(self) -> str:
        """failed, done, running, or unfinished (nothing is running and something is left to do)."""
        statuses = {stage.status for stage in self.stages}
        if statuses & {"failed", "no result"}:
            return "failed"
        if statuses == {"done"}:
            return "done"
        return "running" if "running" in statuses else "unfinished"

    def stage(self, iteration: int, name: str) -> StageRecord:
        """A stage of an iteration; an empty pending one when the run has none."""
        for stage in self.stages:
            if (stage.iteration, stage.name) == (iteration, name):
                return stage
        return StageRecord(iteration, name, _folder(iteration, name))

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks evaluated anywhere in the run, without the longer variants."""
        known = {str(task.get("name")) for task in self.setting("data", "tasks", default=[])}
        names = [
            key.split("/")[-2]
            for stage in self.stages
            if stage.name == "evaluate"
            for key in stage.metrics
            if "tasks/" in key and key.endswith("/pass@1")
        ]
        return list(dict.fromkeys(name for name in names if name in known or not name.endswith("_longer")))

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A value of the recipe by its path."""
        value: Any = self.recipe
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value


def domains(metrics: dict[str, float]) -> list[str]:
    """The domains with a held-out nll, "all" last."""
    keys = [key for key in metrics if "lm/" in key and not key.startswith("lm_eval/")]
    names = list(dict.fromkeys(key.split("/")[-2] for key in keys))
    return sorted(names, key=lambda name: name == "all")


def _planned(recipe: dict[str, Any], iteration: int) -> tuple[str, ...]:
    """The stages the recipe asks of an iteration; none without a recipe."""
    if not recipe or iteration >= int(recipe.get("iterations") or 0):
        return ()
    left_out = {"data", "pretrain"} if iteration else set()
    if (recipe.get("pretrain") or {}).get("checkpoint"):
        left_out.add("pretrain")
    left_out |= {name for name in OPTIONAL if not _enabled(recipe, name)}
    return tuple(name for name in CHAIN if name not in left_out)


def _enabled(recipe: dict[str, Any], name: str) -> bool:
    """Whether the recipe has one of the stages that can be left out. That of a run from before RMT has no rmt."""
    return bool((recipe.get(name) or {"enabled": name != "rmt"}).get("enabled", True))


def _load_stage(run: Path, recipe: dict[str, Any], iteration: int, name: str, state: dict[str, Any]) -> StageRecord:
    folder = _folder(iteration, name)
    status = str(state.get("status") or "pending")
    # A stage that is being redone may still have the result of the time before.
    result = read_json(run / folder / "result.json") if status == "done" else {}
    if status == "done" and not result:
        status = "no result"
    planned = (recipe.get(name) or {}).get("steps") if name in TRAINING else None
    steps = read_metrics(run / folder / "metrics.jsonl")
    final = [stage for stage in OPTIONAL if _enabled(recipe, stage)] or ["rl"]
    return StageRecord(iteration, name, folder, status, result, steps, planned, final[-1])


def _folder(iteration: int, name: str) -> str:
    return f"iteration_{iteration:03d}/{name}"


def _is_of_a_model(metric: str) -> bool:
    return metric.startswith(MEASURED) and not metric.endswith("/unigram_nll")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} for a file that is absent or torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    return value if isinstance(value, dict) else {}
