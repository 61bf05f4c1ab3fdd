"""Where each stage's time went, for the stages that were profiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from nemo_rmt.profiling import PARTS
from nemo_rmt.report.drawing import STYLE, Figure, as_figure
from nemo_rmt.report.run import Run, StageRecord, read_json
from nemo_rmt.report.tables import Table, duration

COLORS = {
    "start": "#8a96a3",
    "data": "#b0983a",
    "rollout": "#8d5aa5",
    "sync": "#c58fd6",
    "scoring": "#2f8f6f",
    "forward_backward": "#3767b0",
    "optimizer": "#7fa3d9",
    "checkpoint": "#d1662b",
    "logging": "#e3a27f",
    "profiler": "#c9ced4",
    "other": "#5b6b7b",
}
"""By part, in the order they are stacked."""


@dataclass(frozen=True)
class Profiles:
    """What the page shows of them."""

    figure: Figure
    table: Table


def section(run: Run) -> Profiles | None:
    """Both; None when no stage was profiled."""
    profiled = [(stage, seconds) for stage in run.stages if (seconds := _seconds(run, stage))]
    if not profiled:
        return None
    sources = [f"{stage.folder}/{PARTS}" for stage, _ in profiled]
    names = [f"iteration {stage.iteration}, {stage.name}" for stage, _ in profiled]
    parts = [part for part in COLORS if any(seconds.get(part) for _, seconds in profiled)]
    with matplotlib.rc_context(STYLE):
        figure = _bars(names, parts, [seconds for _, seconds in profiled], sources)
    rows = [
        [name, duration(sum(seconds.values()))]
        + [duration(seconds[part]) if seconds.get(part) else "–" for part in parts]
        for name, (_, seconds) in zip(names, profiled, strict=True)
    ]
    return Profiles(figure, Table(["stage", "all", *(part.replace("_", " ") for part in parts)], rows, sources))


def _seconds(run: Run, stage: StageRecord) -> dict[str, float]:
    """A stage's seconds by part; {} where it was not profiled, or its file is torn."""
    found: Any = read_json(run.folder / stage.folder / PARTS).get("seconds")
    return found if isinstance(found, dict) else {}


def _bars(names: list[str], parts: list[str], seconds: list[dict[str, float]], sources: list[str]) -> Figure:
    canvas = Canvas(figsize=(10, 1.6 + 0.3 * len(names)), layout="constrained")
    axes = canvas.subplots()
    left = [0.0] * len(names)
    for part in parts:
        widths = [each.get(part, 0.0) for each in seconds]
        axes.barh(range(len(names)), widths, 0.72, left=left, color=COLORS[part], label=part.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds")
    canvas.legend(loc="outside lower center", ncols=6, fontsize=8)
    return as_figure(
        canvas,
        "Seconds of each stage by part",
        "On rank 0, from the start of its process; of a stage that was started several times, the last start. Start is "
        "what passes before the first step and is no part of it: imports, joining ranks, building the model. Traced "
        "steps and the writing of the trace are the profiler's and in no other part.",
        sources,
    )
