"""The page's section on how a reference guided the anneals: their weights, the gap, agreement, and what it cost."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import matplotlib
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure as Canvas

from nemo_rmt.report.drawing import ITERATION_COLORS, STAGE_COLORS, STYLE, Figure, as_figure, curve
from nemo_rmt.report.estimates import Skill, difference
from nemo_rmt.report.run import Run, StageRecord, domains
from nemo_rmt.report.tables import Card, Table
from nemo_rmt.report.weights import WeighedText, weighed_text

GAP_BINS = "remit/gap_hist_"
WIDEST_GAP = 2.0
"""Nats; the histogram's bins go from minus this to this, with what lies beyond in the outer ones."""
COLUMNS = 120
"""Of the map of the gap, each the mean of some steps."""


@dataclass(frozen=True)
class Section:
    """What the page shows, in this order."""

    texts: list[WeighedText]
    figures: list[Figure]
    costs: Card | None


def section(run: Run) -> Section | None:
    """Everything the run has numbers for; None when it has none."""
    anneals = [stage for stage in run.stages if stage.name == "anneal"]
    texts = [text for stage in anneals if (text := weighed_text(run, stage)) is not None]
    with matplotlib.rc_context(STYLE):
        drawn = [*map(gap_over_training, anneals), agreement(run, anneals)]
    figures = [figure for figure in drawn if figure is not None]
    costs = domain_costs(run)
    return Section(texts, figures, costs) if texts or figures or costs else None


def gap_over_training(stage: StageRecord) -> Figure | None:
    """The gap's distribution over the steps as a map, and its mean and mean size; None where it was not logged."""
    names = sorted({name for record in stage.steps for name in record if name.startswith(GAP_BINS)})
    records = [record for record in stage.steps if names and all(record.get(name) is not None for name in names)]
    if not records:
        return None
    wide = -(-len(records) // COLUMNS)
    groups = [records[start : start + wide] for start in range(0, len(records), wide)]
    shares = [[100 * statistics.fmean(record[name] for record in group) for group in groups] for name in names]
    canvas = Canvas(figsize=(10, 3.2), layout="constrained")
    spread, size = canvas.subplots(1, 2, width_ratios=[1.7, 1])
    first, last = records[0]["step"], records[-1]["step"]
    image = spread.imshow(
        shares,
        origin="lower",
        aspect="auto",
        interpolation="none",
        cmap="cividis",
        # Most tokens have hardly any gap: on a linear scale theirs would be the only bins to see.
        norm=PowerNorm(0.5, vmin=0),
        extent=(first - 0.5, last + 0.5, -WIDEST_GAP, WIDEST_GAP),
    )
    spread.grid(visible=False)
    spread.set(title="Distribution of the gap, nats", xlabel="step")
    canvas.colorbar(image, ax=spread, label="% of tokens")
    curve(size, *stage.series("remit/gap_abs"), STAGE_COLORS["anneal"], "mean size")
    curve(size, *stage.series("remit/gap_mean"), STAGE_COLORS["rl"], "mean")
    size.set(title="Mean gap, nats", xlabel="step")
    size.axhline(0, color="#8a96a3", linewidth=0.8)
    size.legend(fontsize=8)
    return as_figure(
        canvas,
        f"The gap over training, iteration {stage.iteration}",
        "The log-probability that the reference gives a token less the model's. Above 0 the reference finds it "
        f"likelier. Gaps beyond ± {WIDEST_GAP:g} nats are in the outer bins; brightness goes by the square root of the "
        "share. A gap that closes is a model that has learned what the reference knows of this text.",
        [f"{stage.folder}/metrics.jsonl"],
    )


def agreement(run: Run, anneals: list[StageRecord]) -> Figure | None:
    """How often model and reference are both right, or both wrong, over the steps; None where it was not logged."""
    stages = [stage for stage in anneals if stage.series("remit/agreement")[0]]
    if not stages:
        return None
    canvas = Canvas(figsize=(10, 2.6), layout="constrained")
    axes = canvas.subplots()
    for stage in stages:
        color = ITERATION_COLORS[stage.iteration % len(ITERATION_COLORS)]
        curve(axes, *stage.series("remit/agreement"), color, f"iteration {stage.iteration}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set(xlabel="step")
    axes.legend(fontsize=8, loc="lower right")
    names = {"previous": "RL model", "previous_sft": "SFT model"}
    reference = run.setting("anneal", "remit", "reference")
    return as_figure(
        canvas,
        f"Agreement with the {names.get(reference, 'reference') if isinstance(reference, str) else 'reference'}",
        "Share of the tokens of which the first guess of both models is right, or that of neither.",
        [f"{stage.folder}/metrics.jsonl" for stage in stages],
    )


def domain_costs(run: Run) -> Card | None:
    """Nats per token of every domain, and the tasks, of each iteration's annealed model; None before there are two."""
    evaluated = (run.stage(iteration, "evaluate") for iteration in range(run.num_iterations))
    stages = [stage for stage in evaluated if "anneal/lm/all/nll" in stage.metrics]
    if len(stages) < 2:
        return None
    first, rows = stages[0], []
    for domain in domains(first.metrics):
        nlls = [stage.metrics.get(f"anneal/lm/{domain}/nll") for stage in stages]
        if None not in nlls:
            changes = [f"{nll:.4f} ({nll - nlls[0]:+.4f})" for nll in nlls[1:]]
            rows.append([f"{'all text' if domain == 'all' else domain}, nats per token", f"{nlls[0]:.4f}", *changes])
    for task in run.tasks:
        for key, name in ((task, task), (f"{task}_longer", f"{task}, longer problems")):
            skills = [Skill.read(stage.metrics, "anneal/", key) for stage in stages]
            if None not in skills:
                start, *later = [skill.pass_at_1 for skill in skills]
                changes = [f"{100 * each.value:.1f} % ({difference(start, each).as_change()})" for each in later]
                rows.append([f"{name}: pass@1", start.as_share(), *changes])
    text = (
        f"Held-out text and tasks of the annealed model of each iteration, with the difference to iteration "
        f"{first.iteration}. Fewer nats and a higher pass@1 are better: a domain whose nats rise pays for the others."
    )
    header = ["held out, base model", *(f"iteration {stage.iteration}" for stage in stages)]
    sources = [f"{stage.folder}/result.json" for stage in stages]
    return Card("What each domain pays", text, Table(header, rows, sources))
