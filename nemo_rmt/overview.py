"""What the flywheel prints: the planned chain before, a summary after."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_rmt import recipes
from nemo_rmt.chain import StageRef, plan_chain
from nemo_rmt.config import RMT, Recipe, Stage
from nemo_rmt.plan.parameters import parameter_count
from nemo_rmt.recipe_io import recipe_differences
from nemo_rmt.run_folder import RunFolder, StageRecord

HEADLINES = {
    "data": ("data/*/train_tokens", "lm/all/unigram_nll"),
    "pretrain": ("train/loss",),
    "anneal": ("train/loss", "remit/weight_std"),
    "rmt": ("rmt/match_rate", "rmt/think_length"),
    "sft": ("train/loss",),
    "rl": ("rl/reward_mean",),
    "evaluate": ("lm/all/nll", "lm/all/unigram_nll", "tokens/hard/ntr", "tasks/*/pass@1", "tasks/*/greedy"),
}
"""Metrics of each stage's result shown in the summary, as patterns; ``*`` stands for one name."""


def print_recipes() -> None:
    """Every recipe with its size, the GPUs it is laid out for, and the stages of one iteration."""
    table = Table("recipe", "parameters", "GPUs", "turns", "stages", "what")
    for name in recipes.names():
        recipe = recipes.build(name)
        processes = recipe.cluster.nodes * recipe.cluster.gpus_per_node
        table.add_row(
            name,
            f"{parameter_count(recipe):,}",
            str(processes) if processes > 1 else "1 or CPU",
            str(recipe.iterations),
            ", ".join(recipe.stages),
            recipes.summary(name),
        )
    wide_console().print(table)


def print_chain(recipe: Recipe, run: RunFolder, done: set[StageRef]) -> None:
    """The resolved chain, which stages are ``done``, what each one reads, and where the recipe was changed."""
    table = Table("stage", "state", "steps", "rows × tokens", "reads", title=f"{recipe.name} in {run.path}")
    for planned in plan_chain(recipe):
        ref = planned.ref
        stage = getattr(recipe, ref.stage, None)
        trains = hasattr(stage, "steps")
        reads = ", ".join(f"{role}: {source}" for role, source in planned.inputs.items())
        table.add_row(
            str(ref) + (f" ({planned.note})" if planned.note else ""),
            "done" if ref in done else "to run",
            str(stage.steps) if trains else "",
            _size(stage) if trains else "",
            reads,
        )
    console = wide_console()
    console.print(table)
    base = recipes.build(recipe.name) if recipe.name in recipes.RECIPES else Recipe()
    differences = recipe_differences(base, recipe)
    named = f"the recipe {base.name}" if base.name == recipe.name else "the defaults"
    console.print(f"Changed from {named}:" if differences else f"Nothing changed from {named}.")
    for line in differences:
        console.print(f"  {line}")
    p = recipe.parallel
    console.print(
        f"Processes: {recipe.cluster.gpus_per_node} = tensor {p.tensor} × pipeline {p.pipeline} × context {p.context} "
        f"× data {recipe.data_parallel}"
    )


def _size(stage: Stage) -> str:
    """What one step trains on."""
    if isinstance(stage, RMT):
        return f"{stage.global_batch_size} positions" + (
            f" × {stage.grpo.samples_per_group}" if stage.objective == "rmt" else ""
        )
    return f"{stage.global_batch_size} × {stage.sequence_length}"


def print_summary(recipe: Recipe, run: RunFolder) -> None:
    """A row per stage, and where the report is."""
    state = run.load_state()
    table = Table("stage", "state", "time", "checkpoint", "metrics")
    for planned in plan_chain(recipe):
        ref = planned.ref
        record = state.record(ref.iteration, ref.stage) if state else StageRecord()
        result = run.result(ref.iteration, ref.stage) or {}
        wall = result.get("wall_s")
        table.add_row(
            str(ref),
            record.status,
            "" if wall is None else f"{wall:.0f} s",
            Path(record.checkpoint).name if record.checkpoint else "",
            _headlines(ref, result.get("metrics", {})),
        )
    console = wide_console()
    console.print(table)
    if run.report_path.exists():
        console.print(f"Report: {run.report_path}")


def _headlines(ref: StageRef, metrics: dict[str, Any]) -> str:
    shown = []
    for pattern in HEADLINES.get(ref.stage, ()):
        for key, value in metrics.items():
            same_depth = key.count("/") == pattern.count("/")
            if same_depth and fnmatchcase(key, pattern) and isinstance(value, (int, float)):
                shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "\n".join(shown)


def wide_console() -> Console:
    """A console that prints text as it is, on one line where nothing is a terminal."""
    console = Console(markup=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=160)
    return console
