"""How the page's plots look, and how they become SVG images inside data URIs: the page needs no other file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Canvas

STAGE_COLORS = {"pretrain": "#5b6b7b", "anneal": "#d1662b", "rmt": "#8d5aa5", "sft": "#2f8f6f", "rl": "#3767b0"}
ITERATION_COLORS = ("#8a96a3", "#3767b0", "#d1662b", "#2f8f6f", "#8d5aa5", "#b0983a")
MAX_POINTS = 400
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_rmt",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a96a3",
    "axes.labelcolor": "#3d4852",
    "xtick.color": "#5b6b7b",
    "ytick.color": "#5b6b7b",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6eaee",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figure:
    """image: data URI; caption: what to see; sources: files it was drawn from, relative to the run."""

    title: str
    image: str
    caption: str
    sources: list[str]


def curve(
    axes: Any, steps: list[int], values: list[float], color: str, label: str | None, *, windows: int = 40
) -> None:
    """Single steps faintly, their running mean boldly; it spans one ``windows``-th of the points up to there."""
    if not steps:
        return
    window = max(1, len(values) // windows)
    axes.plot(*thin(steps, values), color=color, linewidth=0.8 if window > 1 else 1.4, alpha=0.3 if window > 1 else 1)
    if window > 1:
        total, means = 0.0, []
        for place, value in enumerate(values):
            total += value - (values[place - window] if place >= window else 0.0)
            means.append(total / min(place + 1, window))
        axes.plot(*thin(steps, means), color=color, linewidth=1.8, label=label)
    else:
        axes.lines[-1].set_label(label)


def thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MAX_POINTS of a curve, the last one included: a long run must not make a page of many megabytes."""
    stride = -(-len(steps) // MAX_POINTS) or 1
    return steps[::-1][::stride][::-1], values[::-1][::stride][::-1]


def as_figure(canvas: Canvas, title: str, caption: str, sources: list[str]) -> Figure:
    """The drawn canvas as a Figure. An image keeps the ids inside its SVG apart from those of the other figures."""
    file = io.BytesIO()
    canvas.savefig(file, format="svg", metadata={"Date": None})
    image = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
    return Figure(title, image, caption, list(dict.fromkeys(sources)))
