"""The plots of an experiment's page: every seed of every arm, differences to the control, curves over the anneal."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Canvas

from nemo_rmt.experiment.comparison import Comparison, Results
from nemo_rmt.experiment.measured import curve_name
from nemo_rmt.report.drawing import Figure, as_figure

if TYPE_CHECKING:
    from nemo_rmt.experiment.config import Metric

CONTROL_COLOR = "#5b6b7b"
COLORS = ("#3767b0", "#d1662b", "#2f8f6f", "#8d5aa5", "#b0983a", "#b8456b", "#3d9db0", "#7a5a3c")
SOURCES = ["results.json"]


def scores(results: Results, comparisons: list[Comparison]) -> Figure | None:
    """Every seed a dot, the same seed joined by a line; and the paired differences with their intervals. None before
    anything was measured."""
    shown = [comparison for comparison in comparisons if comparison.values]
    if not shown:
        return None
    metric, colors = shown[0].metric, _arm_colors(results)
    canvas = Canvas(figsize=(10, 1.5 + 0.42 * len(shown)), layout="constrained")
    own, differences = canvas.subplots(1, 2, sharey=True)
    for seed in results.experiment.seeds:
        points = [(each.values[seed], place) for place, each in enumerate(shown) if seed in each.values]
        own.plot([value for value, _ in points], [place for _, place in points], color="#c9ced4", linewidth=0.8)
    for place, each in enumerate(shown):
        _draw_seeds(own, place, each.values, colors[each.arm])
        own.plot([each.mean], [place], "|", color=colors[each.arm], markersize=20, markeredgewidth=2.4)
        if each.interval is not None:
            _draw_difference(differences, place, each, colors[each.arm])
    own.set_yticks(range(len(shown)), [each.arm for each in shown])
    own.set_ylim(len(shown) - 0.5, -0.5)
    own.set_title("Every seed, and the mean")
    differences.axvline(0, color="#222b33", linewidth=0.9)
    differences.set_title(f"Difference to {results.experiment.control}")
    for axes in (own, differences):
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(direction(metric))
    return as_figure(
        canvas,
        f"{metric.label}: arms and seeds",
        "Dots are seeds, thin lines join the arms of one seed, strokes are means. On the right the mean difference to "
        "the control's same seeds, with its 95 % bootstrap interval.",
        SOURCES,
    )


def _draw_seeds(axes: Any, place: int, values: dict[int, float], color: str) -> None:
    axes.plot(list(values.values()), [place] * len(values), "o", color=color, markersize=4, alpha=0.6)


def _draw_difference(axes: Any, place: int, comparison: Comparison, color: str) -> None:
    mean, low, high = comparison.interval
    _draw_seeds(axes, place, comparison.differences, color)
    errors = [[mean - low], [high - mean]] if math.isfinite(low) else None
    axes.errorbar([mean], [place], xerr=errors, color=color, marker="D", markersize=6, capsize=4, linewidth=1.6)


def curves(results: Results, comparisons: list[Comparison]) -> Figure | None:
    """A metric over the steps of each arm's last anneal; None where it was not measured on the way."""
    metric, colors = comparisons[0].metric, _arm_colors(results)
    name, found = curve_name(metric.name), {}
    for arm, seeds in results.arms.items():
        measured = [each.curves[name] for each in seeds.values() if each.curves.get(name)]
        if metric.curve and measured:
            found[arm] = measured
    if not found:
        return None
    canvas = Canvas(figsize=(10, 3.8), layout="constrained")
    axes = canvas.subplots()
    for arm, seeds in found.items():
        for points in seeds:
            axes.plot(*zip(*sorted(points.items()), strict=True), color=colors[arm], linewidth=0.7, alpha=0.35)
        # A mean over other seeds at every step would jump where one is missing.
        steps = sorted(set.intersection(*(set(points) for points in seeds)))
        means = [statistics.fmean(points[step] for points in seeds) for step in steps]
        axes.plot(steps, means, "o-", color=colors[arm], linewidth=1.8, markersize=3.5, label=arm)
    control = comparisons[0]
    if control.mean is not None:
        label = f"{control.arm} at its end"
        axes.axhline(control.mean, color=CONTROL_COLOR, linestyle="--", linewidth=1.1, label=label)
    axes.set(xlabel="step of the last anneal", ylabel=direction(metric))
    canvas.legend(loc="outside upper left", ncols=4, fontsize=8)
    return as_figure(
        canvas,
        f"{metric.label}: over the anneal",
        "Thin lines are seeds, bold ones their means at the steps that all of them were measured at.",
        SOURCES,
    )


def _arm_colors(results: Results) -> dict[str, str]:
    """The same for an arm in every plot; they repeat beyond eight arms."""
    control, *arms = results.arms
    return {control: CONTROL_COLOR, **{arm: COLORS[place % len(COLORS)] for place, arm in enumerate(arms)}}


def direction(metric: Metric) -> str:
    """Which way is better."""
    return "more is better" if metric.higher_is_better else "less is better"
