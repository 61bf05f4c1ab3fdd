"""The page's plots of the stages that every run has, and of ReMiT's weights."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from nemo_rmt.report.drawing import ITERATION_COLORS, STAGE_COLORS, STYLE, Figure, as_figure, curve, thin
from nemo_rmt.report.estimates import Skill
from nemo_rmt.report.rollouts import mismatch
from nemo_rmt.report.run import TRAINING, Run, StageRecord
from nemo_rmt.report.tables import MODEL_NAMES, MODELS, prefix


def all_figures(run: Run) -> list[Figure]:
    """Every figure the run has numbers for."""
    with matplotlib.rc_context(STYLE):
        drawn = [accuracy(run), losses(run), reinforcement(run), mismatch(run)]
        epsilon = float(run.setting("anneal", "remit", "epsilon", default=0.2))
        drawn += [remit_weights(stage, epsilon) for stage in run.stages if stage.has_remit]
    return [figure for figure in drawn if figure is not None]


def accuracy(run: Run) -> Figure | None:
    """pass@1 of each stage's model, iteration beside iteration, with intervals and greedy accuracy."""
    panels, sources = [], []
    for task in run.tasks:
        for key, title in ((task, f"{task}, trained lengths"), (f"{task}_longer", f"{task}, longer problems")):
            bars = {}
            for iteration in range(run.num_iterations):
                stage = run.stage(iteration, "evaluate")
                for model in MODELS:
                    skill = Skill.read(stage.metrics, prefix(model), key)
                    if skill is not None:
                        bars[iteration, model] = skill
                        sources.append(f"{stage.folder}/result.json")
            if bars:
                panels.append((title, bars))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Canvas(figsize=(10, 3.1 * rows), layout="constrained")
    grid = canvas.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (title, bars) in zip(grid.flat, panels):
        _draw_bars(axes, title, bars, run.num_iterations)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    grid[0, 0].legend(loc="upper left", ncols=2, fontsize=8)
    return as_figure(
        canvas,
        "Accuracy by iteration",
        "Share of held-out problems solved by each stage's model: bars are pass@1 (sampled at temperature 1) with 95 % "
        "intervals, diamonds are greedy decoding. Where diamonds are high and bars rise to meet them, skill that was "
        "there is used more reliably.",
        sources,
    )


def _draw_bars(axes: Any, title: str, bars: dict[tuple[int, str], Skill], iterations: int) -> None:
    models = [model for model in MODELS if any(key[1] == model for key in bars)]
    width = 0.8 / iterations
    for iteration in range(iterations):
        color = ITERATION_COLORS[iteration % len(ITERATION_COLORS)]
        for place, model in enumerate(models):
            skill = bars.get((iteration, model))
            if skill is None:
                continue
            x, share = place + (iteration - (iterations - 1) / 2) * width, skill.pass_at_1
            first = model == next(m for m in models if (iteration, m) in bars)
            axes.bar(x, share.value, width * 0.92, color=color, label=f"iteration {iteration}" if first else None)
            if share.low is not None:
                errors = [[max(0, share.value - share.low)], [max(0, share.high - share.value)]]
                axes.errorbar(x, share.value, yerr=errors, color="#222b33", capsize=3, linewidth=1)
            if skill.greedy is not None:
                label = "greedy" if first and iteration == min(key[0] for key in bars) else None
                axes.plot(
                    x,
                    skill.greedy.value,
                    "D",
                    color="white",
                    markeredgecolor="#222b33",
                    markersize=5,
                    label=label,
                    linestyle="none",
                    zorder=5,
                )
    axes.set_title(title)
    axes.set_xticks(range(len(models)), [MODEL_NAMES[model] for model in models])
    axes.set_ylim(0, 1.19)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def losses(run: Run) -> Figure | None:
    """Loss, RL loss and learning rate of every training stage, one after the other."""
    stages = [stage for stage in run.stages if stage.name in TRAINING and stage.steps]
    if not stages:
        return None
    canvas = Canvas(figsize=(10, 5.6), layout="constrained")
    loss, rl_loss, rate = canvas.subplots(3, 1, sharex=True, height_ratios=[3, 1.2, 1.2])
    panels = {"rl": ((rl_loss, "train/loss"),), "rmt": ((loss, "ntp/loss"), (rl_loss, "rl/loss"))}
    start, iteration = 0, -1
    for stage in stages:
        color, last = STAGE_COLORS[stage.name], stage.steps[-1]["step"]
        for axes, name in panels.get(stage.name, ((loss, "train/loss"),)):
            steps, values = stage.series(name)
            curve(axes, [start + step for step in steps], values, color, None)
        steps, rates = stage.series("train/lr")
        rate.plot(*thin([start + step for step in steps], rates), color=color, linewidth=1.4)
        for axes in (loss, rl_loss, rate):
            axes.axvspan(start, start + last, color=color, alpha=0.07, linewidth=0)
        if stage.iteration != iteration:
            iteration = stage.iteration
            loss.annotate(
                f"iteration {iteration}",
                (start, 1.0),
                xytext=(2, -10),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=8,
                color="#3d4852",
            )
            for axes in (loss, rl_loss, rate):
                axes.axvline(start, color="#8a96a3", linewidth=0.8)
        start += last
    names = [name for name in TRAINING if any(stage.name == name for stage in stages)]
    loss.legend(
        handles=[Line2D([], [], color=STAGE_COLORS[name], linewidth=2, label=name) for name in names],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        ncols=len(names),
        fontsize=8,
    )
    loss.set_title("Training loss, nats per token")
    rl_loss.set_title("GRPO loss")
    rate.set_title("Learning rate")
    rate.set_xlabel("optimizer steps, stages in the order they ran")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=False)
    loss.margins(x=0.005, y=0.12)
    return as_figure(
        canvas,
        "Loss and learning rate",
        "Every training stage in order. Faint lines are single steps, bold ones a running mean. Bases of different "
        "iterations are comparable; RMT's next-token and GRPO terms are in their own panels, SFT's loss counts the "
        "assistant's tokens only, and GRPO's loss is near 0 by construction: its reward, below, is what to read.",
        [f"{stage.folder}/metrics.jsonl" for stage in stages],
    )


def reinforcement(run: Run) -> Figure | None:
    """Reward and response length of RL, iterations overlaid."""
    stages = [stage for stage in run.stages if stage.name == "rl" and stage.steps]
    if not stages:
        return None
    canvas = Canvas(figsize=(10, 2.9), layout="constrained")
    panels = (
        ("rl/reward_mean", "Mean reward"),
        ("rl/response_length", "Response length, tokens"),
        ("rl/zero_variance_groups", "Groups without variance, share"),
    )
    for axes, (name, title) in zip(canvas.subplots(1, 3), panels):
        for stage in stages:
            color = ITERATION_COLORS[stage.iteration % len(ITERATION_COLORS)]
            curve(axes, *stage.series(name), color, f"iteration {stage.iteration}")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if name != "rl/response_length" else None)
    canvas.axes[0].legend(loc="lower right", fontsize=8)
    return as_figure(
        canvas,
        "Reinforcement learning",
        "Reward and length of the sampled responses in training. A group whose responses all got the same reward "
        "carries no signal; when most groups do, more steps bring little.",
        [f"{stage.folder}/metrics.jsonl" for stage in stages],
    )


def remit_weights(stage: StageRecord, epsilon: float) -> Figure:
    """ReMiT's weights in one anneal: their distribution early and late, spread and clipping over the steps."""
    canvas = Canvas(figsize=(10, 2.9), layout="constrained")
    histogram, spread, clipped = canvas.subplots(1, 3)
    bins = sorted({name for record in stage.steps for name in record if name.startswith("remit/weight_hist_")})
    window = max(1, min(20, len(stage.steps) // 5))
    low, high = 1 - epsilon, 1 + epsilon
    edges = [low + (high - low) * i / max(1, len(bins)) for i in range(len(bins) + 1)]
    for records, color, name in (
        (stage.steps[:window], "#8a96a3", f"first {window} steps" if window > 1 else "first step"),
        (stage.steps[-window:], "#d1662b", f"last {window} steps" if window > 1 else "last step"),
    ):
        shares = [sum(record.get(key) or 0 for record in records) / len(records) for key in bins]
        if bins:
            histogram.stairs(
                [100 * share for share in shares],
                edges,
                fill=color != "#d1662b",
                color=color,
                label=name,
                alpha=0.55 if color != "#d1662b" else 1,
                linewidth=1.6,
            )
    histogram.set(title="Distribution of weights, % of tokens", xlabel="weight")
    histogram.set_ylim(0, histogram.get_ylim()[1] * 1.25)
    if bins:
        histogram.legend(fontsize=8, loc="upper left", ncols=2)

    steps, means = stage.series("remit/weight_mean")
    _, deviations = stage.series("remit/weight_std")
    if len(means) == len(deviations):
        thin_steps, lower = thin(steps, [mean - std for mean, std in zip(means, deviations)])
        _, upper = thin(steps, [mean + std for mean, std in zip(means, deviations)])
        spread.fill_between(thin_steps, lower, upper, color="#d1662b", alpha=0.2, linewidth=0, label="± 1 std")
    spread.plot(*thin(steps, means), color="#d1662b", linewidth=1.6, label="mean")
    spread.set(title="Mean and spread", xlabel="step")
    spread.set_ylim(low, high)
    spread.legend(fontsize=8, loc="upper right", ncols=2)
    for name, color, label in (("share_low", "#3767b0", f"at {low:.2g}"), ("share_high", "#d1662b", f"at {high:.2g}")):
        steps, shares = stage.series(f"remit/{name}")
        curve(clipped, steps, [100 * share for share in shares], color, label)
    clipped.set(title="Clipped, % of tokens", xlabel="step")
    clipped.set_ylim(0, clipped.get_ylim()[1] * 1.2)
    clipped.legend(fontsize=8, loc="upper right", ncols=2)
    return as_figure(
        canvas,
        f"ReMiT's token weights, iteration {stage.iteration}",
        "How strongly the reference re-weights the corpus. Tokens it finds likelier than the base does, more than is "
        "usual in their document, weigh above 1. Clipped tokens are in the outer bins.",
        [f"{stage.folder}/metrics.jsonl"],
    )
