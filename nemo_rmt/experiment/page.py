"""An experiment's results as tables and sentences, on one self-contained page and as Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib

from nemo_rmt.experiment import plots
from nemo_rmt.experiment.comparison import Comparison, Results
from nemo_rmt.report.drawing import STYLE, Figure
from nemo_rmt.report.shell import render
from nemo_rmt.report.tables import Table, count

if TYPE_CHECKING:
    from nemo_rmt.experiment.config import Metric

NOTES = [
    "Differences are paired: an arm's score less that of the control with the same seed. Brackets are 95 % bootstrap "
    "intervals over seeds, which are too narrow over few: without any effect 17 of 100 exclude 0 with five seeds, 25 "
    "with three. p is exact: of all choices of the differences' signs, the share whose mean is as far from 0; with "
    "five seeds it cannot be below 0.0625. “Better” and “worse” mean that the interval excludes 0 and p is at most "
    "0.1, which takes five seeds that all point one way, or more. Nothing is corrected for the number of arms and "
    "metrics.",
    "Tokens are all that the chain trained on or sampled, FLOPs those of the whole chain: training counts three "
    "forwards per token, a reference's scoring and sampling one.",
]
CURVE_NOTE = (
    "Steps to the control's score are those of the last anneal until the arm was first as good as the same seed's "
    "control at its end: the median over seeds, where never counts as later than any, and how many seeds reached it. "
    "Between measured checkpoints the curve is taken to be a straight line; before the first one nothing is known, so "
    "that is the earliest answer."
)
SOURCES = ["results.json", "results.csv"]


@dataclass(frozen=True)
class MetricPart:
    """What is shown of one metric."""

    metric: Metric
    table: Table
    sentences: list[str]
    figures: list[Figure]


def metric_parts(results: Results) -> list[MetricPart]:
    """Every metric of the experiment."""
    found = []
    with matplotlib.rc_context(STYLE):
        for metric in results.experiment.metrics:
            comparisons = results.comparisons[metric.name]
            drawn = [plots.scores(results, comparisons), plots.curves(results, comparisons)]
            figures = [figure for figure in drawn if figure is not None]
            sentences = [text for each in comparisons if (text := sentence(each)) is not None]
            found.append(MetricPart(metric, metric_table(results, comparisons), sentences, figures))
    return found


def page(results: Results, name: str, metrics: list[MetricPart]) -> str:
    """The HTML. name: the experiment's."""
    experiment, done = results.experiment, sum(map(len, results.arms.values()))
    asked = len(results.arms) * len(experiment.seeds)
    facts = [
        ("arms and seeds done", f"{done} of {asked}"),
        ("seeds", str(len(experiment.seeds))),
        ("control", experiment.control),
        ("recipe", experiment.recipe),
    ]
    return render(
        "experiment.html.j2",
        name=name,
        about=experiment.about,
        status="done" if done == asked else "unfinished",
        facts=facts,
        arms=arm_table(results),
        overview=overview_table(results),
        metrics=metrics,
        notes=notes(results),
        direction=plots.direction,
    )


def markdown(results: Results, name: str, metrics: list[MetricPart]) -> str:
    """The same tables and sentences, for a README."""
    blocks = [f"## {name}", results.experiment.about]
    blocks += [_markdown_table(table) for table in (arm_table(results), overview_table(results))]
    for part in metrics:
        blocks += [
            f"### {part.metric.label}",
            f"`{part.metric.name}`, {plots.direction(part.metric)}",
            _markdown_table(part.table),
        ]
        blocks.append("\n".join(f"- {sentence}" for sentence in part.sentences))
    return "\n\n".join(block for block in [*blocks, *notes(results)] if block) + "\n"


def notes(results: Results) -> list[str]:
    """What to know before reading the tables."""
    return [*NOTES, CURVE_NOTE] if any(metric.curve for metric in results.experiment.metrics) else NOTES


def arm_table(results: Results) -> Table:
    """What each arm is, how much of it is done and what it took."""
    rows = []
    for name, seeds in results.arms.items():
        rows.append(
            [
                _arm(results, name),
                results.experiment.arms[name].about,
                f"{len(seeds)} of {len(results.experiment.seeds)}",
                *_cost_cells(results, name),
            ]
        )
    return Table(["arm", "what it is", "seeds done", "tokens", "FLOPs", "FLOPs to control's"], rows, SOURCES)


def overview_table(results: Results) -> Table:
    """Every metric: the control's mean, and how far the other arms are from it."""
    control, *arms = results.arms
    rows = []
    for metric in results.experiment.metrics:
        own, *others = results.comparisons[metric.name]
        rows.append(
            [
                f"{metric.label} ({'↑' if metric.higher_is_better else '↓'})",
                "–" if own.mean is None else f"{own.mean:.3f}",
                *map(_in_short, others),
            ]
        )
    return Table(["metric (↑ more is better, ↓ less)", control, *(_arm(results, arm) for arm in arms)], rows, SOURCES)


def metric_table(results: Results, comparisons: list[Comparison]) -> Table:
    """Every arm in one metric."""
    has_steps, control = any(each.steps for each in comparisons), results.experiment.control
    header = ["arm", "seeds", "mean", f"difference to {control}", "p", "verdict"]
    header += ["steps to control's score"] if has_steps else []
    rows = []
    for each in comparisons:
        row = [_arm(results, each.arm), str(len(each.values)), "–" if each.mean is None else number(each.mean)]
        row += ["–", "–", "control"] if each.arm == control else _difference_cells(each)
        row += [_steps(each)] if has_steps else []
        tokens, _, relative = _cost_cells(results, each.arm)
        rows.append([*row, tokens, relative])
    return Table([*header, "tokens", "FLOPs to control's"], rows, SOURCES)


def sentence(comparison: Comparison) -> str | None:
    """What the numbers say of one arm; None where there is nothing to compare."""
    verdict, arm, control = comparison.verdict, comparison.arm, comparison.control
    if verdict is None:
        return None
    seeds = len(comparison.differences)
    if verdict == "too few seeds":
        told = "one seed tells" if seeds == 1 else f"{seeds} seeds tell"
        return f"{arm}: {told} too little about chance ({_difference(comparison)} to {control})."
    lowest = ", the lowest that so few can give" if comparison.p == 2 ** (1 - seeds) and comparison.p > 0.05 else ""
    told = f"{verdict} than {control}" if verdict in ("better", "worse") else f"not distinguishable from {control}"
    return f"{arm} is {told} with {seeds} seeds: {_difference(comparison)}, p = {comparison.p:.3g}{lowest}."


def number(value: float, sign: str = "") -> str:
    """``0.4710``, ``-12.35``: four digits of a share or a loss."""
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.4g}"


def _difference(comparison: Comparison) -> str:
    mean, low, high = comparison.interval
    interval = f" [{number(low, '+')}, {number(high, '+')}]" if math.isfinite(low) else ""
    return number(mean, "+") + interval


def _in_short(comparison: Comparison) -> str:
    """``+0.053 [+0.020, +0.081] better``; no word where nothing can be told."""
    if comparison.interval is None:
        return "–"
    mean, low, high = comparison.interval
    interval = f" [{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else ""
    verdict = f" {comparison.verdict}" if comparison.verdict in ("better", "worse") else ""
    return f"{mean:+.3f}{interval}{verdict}"


def _difference_cells(comparison: Comparison) -> list[str]:
    """Difference, p and verdict."""
    if comparison.interval is None:
        return ["–", "–", "–"]
    return [_difference(comparison), f"{comparison.p:.3g}", comparison.verdict]


def _steps(comparison: Comparison) -> str:
    if not comparison.steps:
        return "–"
    reached = sum(step is not None for step in comparison.steps.values())
    median = comparison.median_steps
    return f"{'not reached' if median is None else f'{median:,.0f}'} ({reached} of {len(comparison.steps)})"


def _cost_cells(results: Results, arm: str) -> list[str]:
    """Tokens, FLOPs and FLOPs relative to the control's."""
    cost = results.cost(arm)
    if cost is None:
        return ["–", "–", "–"]
    return [count(cost.tokens), f"{cost.flops:.3g}", "–" if cost.relative is None else f"{cost.relative:.2f}×"]


def _arm(results: Results, name: str) -> str:
    """The arm's name, with the arm whose FLOPs it was given."""
    equal = results.experiment.arms[name].equal_flops
    return name if equal is None else f"{name} (FLOPs of {equal})"


def _markdown_table(table: Table) -> str:
    rows = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
