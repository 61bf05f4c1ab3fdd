"""The page's tables as strings."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from nemo_rmt.report.estimates import Estimate, estimate
from nemo_rmt.report.run import TRAINING, Run, StageRecord

MODELS = ("pretrain", "anneal", "rmt", "sft", "rl")
MODEL_NAMES = {
    "pretrain": "pre-trained",
    "anneal": "annealed",
    "rmt": "after RMT",
    "sft": "after SFT",
    "rl": "after RL",
}


@dataclass(frozen=True)
class Table:
    """header: one title per column; rows: cells, the first naming the row; sources: files, relative to the run."""

    header: list[str]
    rows: list[list[str]]
    sources: list[str]


@dataclass(frozen=True)
class Card:
    """A table with its title and what to know before reading it."""

    title: str
    text: str
    table: Table


def prefix(model: str) -> str:
    """What evaluate puts before the metrics of a stage's model: nothing for the iteration's final one."""
    return "" if model == "rl" else f"{model}/"


def facts(run: Run) -> list[tuple[str, str]]:
    """The header's figures."""
    wall = sum(stage.result.get("wall_s") or 0 for stage in run.stages)
    tokens = sum(stage.result.get("tokens") or 0 for stage in run.stages if stage.name in TRAINING)
    done = sum(stage.status == "done" for stage in run.stages)
    return [
        ("wall time, all stages", duration(wall)),
        ("tokens trained on", count(tokens)),
        ("stages done", f"{done} of {len(run.stages)}"),
        ("iterations", str(run.num_iterations)),
    ]


def stage_rows(run: Run) -> list[dict[str, str]]:
    """One row per stage: iteration, name, status, steps, tokens, wall, speed and folder."""
    return [
        {
            "iteration": str(stage.iteration),
            "name": stage.name + _variant(stage),
            "status": stage.status,
            "steps": _steps(stage),
            "tokens": count(stage.result["tokens"]) if stage.result.get("tokens") else "–",
            "wall": duration(stage.result["wall_s"]) if stage.result.get("wall_s") is not None else "–",
            "speed": _speed(stage),
            "folder": stage.folder,
        }
        for stage in run.stages
    ]


def tier_table(run: Run) -> Table | None:
    """Next-token accuracy by the entropy tier of the token, per evaluated model; None without an evaluation."""
    low, high = run.setting("evaluate", "tier_edges", default=(0.5, 1.5))
    names = {"easy": f"easy (< {low:g} nats)", "medium": "medium", "hard": f"hard (≥ {high:g} nats)"}
    rows, sources = [], []
    for iteration in range(run.num_iterations):
        stage = run.stage(iteration, "evaluate")
        for model in MODELS:
            cells = [_tier(stage.metrics, f"{prefix(model)}tokens/{tier}/") for tier in names]
            if any(cell != "–" for cell in cells):
                rows.append([f"iteration {iteration}, {MODEL_NAMES[model]}", *cells])
                sources.append(f"{stage.folder}/result.json")
    return Table(["model", *names.values()], rows, unique(sources)) if rows else None


def _tier(metrics: dict[str, float], base: str) -> str:
    if base + "accuracy" not in metrics:
        return "–"
    portion = metrics.get(base + "share")
    of_tokens = "" if portion is None else f" of {100 * portion:.0f} % of tokens"
    return f"{100 * metrics[base + 'accuracy']:.1f} %{of_tokens}"


def lm_eval_table(run: Run) -> Table | None:
    """lm-eval's figures of each iteration's final model, beside our own of the same problems; None without any."""
    rows, sources = [], []
    for iteration in range(run.num_iterations):
        stage = run.stage(iteration, "evaluate")
        found = {key for key in stage.metrics if key.startswith("lm_eval/")}
        for key in (key for key in stage.metrics if key in found and f"{key}_stderr" in found):
            _, task, metric = key.split("/", 2)
            ours = f"{task.removesuffix('_greedy')}/greedy" if task.endswith("_greedy") else f"{task}/{metric}"
            own = estimate(stage.metrics, f"{prefix(stage.final_model)}tasks/{ours}")
            rows.append([f"iteration {iteration}, {task}: {metric}", share(own), _with_error(stage.metrics, key)])
            sources.append(f"{stage.folder}/result.json")
    return Table(["task", "our evaluation", "lm-eval"], rows, unique(sources)) if rows else None


def _with_error(metrics: dict[str, float], key: str) -> str:
    """A figure of lm-eval's with the 95 % interval that its standard error makes; not every metric is a share."""
    value, half = metrics[key], 1.96 * metrics[f"{key}_stderr"]
    if not 0 <= value <= 1:
        return f"{value:.4g} [{value - half:.4g}, {value + half:.4g}]"
    return Estimate(value, max(0.0, value - half), min(1.0, value + half)).as_share()


def _variant(stage: StageRecord) -> str:
    """What is not plain about a stage's objective, by what it logged."""
    if stage.has_remit:
        return " (ReMiT)"
    for name, logged in (("Rho-1", "rho1/selected"), ("distillation", "distill/divergence")):
        if any(logged in record for record in stage.steps):
            return f" ({name})"
    return " (next-token prediction)" if stage.is_rmt_baseline else ""


def _steps(stage: StageRecord) -> str:
    if stage.name not in TRAINING:
        return "–"
    reached = stage.steps[-1]["step"] if stage.steps else 0
    return f"{reached:,}" if stage.planned_steps in (None, reached) else f"{reached:,} of {stage.planned_steps:,}"


def _speed(stage: StageRecord) -> str:
    """The median step's tokens per second; the stage's average where steps were not logged."""
    _, speeds = stage.series("train/tokens_per_s")
    if speeds:
        return count(statistics.median(speeds))
    tokens, wall = stage.result.get("tokens"), stage.result.get("wall_s")
    return count(tokens / wall) if stage.name in TRAINING and tokens and wall else "–"


def share(estimate: Estimate | None) -> str:
    """``47.1 % [44.0, 50.2]``, or a dash for what was not measured."""
    return "–" if estimate is None else estimate.as_share()


def unique(entries: list[str]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(entries))


def count(number: float) -> str:
    """``812``, ``18.2 k``, ``1.54 M``, ``3.20 G``."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1e3:.1f} k" if number >= 1e3 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """``4 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
