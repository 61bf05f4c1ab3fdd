"""The page's section on RMT: its training, held-out positions before and after it, and the paper's own figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from nemo_rmt.report.drawing import STAGE_COLORS, STYLE, Figure, as_figure, curve, thin
from nemo_rmt.report.estimates import Estimate
from nemo_rmt.report.reasoning import TIERS, Reasoning, ThoughtLength, before_and_after, start_model
from nemo_rmt.report.run import Run, StageRecord
from nemo_rmt.report.tables import MODEL_NAMES, MODELS, Card, Table, share

TIER_COLORS = {"easy": "#9dbbe0", "medium": "#4f83c4", "hard": "#17325f"}
DIRECT_COLOR = "#8a96a3"
WINDOWS = 20  # a curve's running mean spans a twentieth of the steps
HEADROOM = 1.22  # room for the legend above the curves


@dataclass(frozen=True)
class Section:
    """What the page shows of RMT, figures first."""

    figures: list[Figure]
    cards: list[Card]


def section(run: Run) -> Section | None:
    """Everything the run has numbers for; None when it has none of RMT."""
    with matplotlib.rc_context(STYLE):
        drawn = [figure for figure in (training(run), held_out(run)) if figure is not None]
    cards = [accuracy_card(run, iteration) for iteration in range(run.num_iterations)]
    cards = [card for card in (*cards, paper_card(run)) if card is not None]
    return Section(drawn, cards) if drawn or cards else None


def training(run: Run) -> Figure | None:
    """Thought length and budget, rewards, and the tiers asked for, over the steps; a column per iteration."""
    stages = [stage for stage in run.stages if stage.name == "rmt" and stage.has_reasoning]
    if not stages:
        return None
    panels = {
        "Thought length (tokens)": _draw_length,
        "Match, format and reward": _draw_rewards,
        "Tiers asked for (dashed: target)": _draw_tier_shares,
        "Groups with a match": _draw_rewarded_groups,
    }
    if len(stages) == 1:
        canvas = Canvas(figsize=(10, 5.6), layout="constrained")
        columns = [list(canvas.subplots(2, 2, sharex=True).flat)]
    else:
        canvas = Canvas(figsize=(5 * len(stages), 10.4), layout="constrained")
        columns = canvas.subplots(len(panels), len(stages), sharex=True, sharey="row").T
    for stage, column in zip(stages, columns):
        for axes, (title, draw) in zip(column, panels.items()):
            draw(axes, stage)
            axes.set_title(title if run.num_iterations == 1 else f"{title}: iteration {stage.iteration}")
    for axes in canvas.axes:
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", ncols=3, fontsize=8)
    return as_figure(
        canvas,
        "RMT over its steps",
        "How long the model thinks beside the budget it is asked for; how often its prediction matches the corpus, how "
        "often it closes its thought and predicts something, and the mean reward; from which tier of difficulty the "
        "predicted tokens came; and the share of each tier's groups in which any response was right: the others teach "
        f"nothing about the token. Faint lines are single steps, bold ones the mean of the last 1/{WINDOWS} of the "
        "steps up to there; budget and targets are as they are.",
        [f"{stage.folder}/metrics.jsonl" for stage in stages],
    )


def _draw_length(axes: Any, stage: StageRecord) -> None:
    steps, budgets = stage.series("rmt/budget")
    if budgets:
        axes.plot(*thin(steps, budgets), color="#222b33", linestyle="--", linewidth=1.2, label="budget")
    lengths = stage.series("rmt/think_length")
    curve(axes, *lengths, STAGE_COLORS["rmt"], "mean thought", windows=WINDOWS)
    # Axes are shared by the iterations: the limit only grows.
    axes.set_ylim(0, max(axes.get_ylim()[1], HEADROOM * max([*budgets, *lengths[1], 1])))


def _draw_rewards(axes: Any, stage: StageRecord) -> None:
    for name, label, color in (
        ("match_rate", "match", STAGE_COLORS["rmt"]),
        ("format_rate", "format", "#2f8f6f"),
        ("reward_mean", "reward", "#d1662b"),
    ):
        curve(axes, *stage.series(f"rmt/{name}"), color, label, windows=WINDOWS)
    _as_shares(axes)


def _draw_tier_shares(axes: Any, stage: StageRecord) -> None:
    for tier, color in TIER_COLORS.items():
        steps, targets = stage.series(f"rmt/target_{tier}")
        axes.plot(*thin(steps, targets), color=color, linestyle="--", linewidth=1.2)
        curve(axes, *stage.series(f"rmt/share_{tier}"), color, tier, windows=WINDOWS)
    _as_shares(axes)


def _draw_rewarded_groups(axes: Any, stage: StageRecord) -> None:
    for tier, color in TIER_COLORS.items():
        curve(axes, *stage.series(f"rmt/rewarded_{tier}"), color, tier, windows=WINDOWS)
    _as_shares(axes)


def _as_shares(axes: Any) -> None:
    axes.set_ylim(0, HEADROOM)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def held_out(run: Run) -> Figure | None:
    """Accuracy directly and after a thought, before and after RMT: a row per iteration, a column per tier."""
    rows = {iteration: before_and_after(run, iteration) for iteration in range(run.num_iterations)}
    rows = {iteration: pairs for iteration, pairs in rows.items() if pairs}
    tiers = [tier for tier in TIERS if any(tier in pairs for pairs in rows.values())]
    if not tiers:
        return None
    canvas = Canvas(figsize=(10, 0.5 + 2.7 * len(rows)), layout="constrained")
    grid = canvas.subplots(len(rows), len(tiers), squeeze=False, sharex=True, sharey="col")
    for line, (iteration, pairs) in zip(grid, rows.items()):
        for axes, tier in zip(line, tiers):
            if tier in pairs:
                _draw_pair(axes, *pairs[tier])
            axes.set_title(f"{tier} tokens" + (f": iteration {iteration}" if run.num_iterations > 1 else ""))
            axes.set_xticks([0, 1], ["before", "after"])
            axes.set_xlim(-0.4, 1.4)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    for axes in grid[0]:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.05 * high), high)  # no share is below 0
    handles, labels = next(axes.get_legend_handles_labels() for axes in canvas.axes if axes.containers)
    canvas.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8)
    return as_figure(
        canvas,
        "Held-out tokens predicted directly and after a thought",
        "The same positions before and after the stage rmt, with 95 % intervals; each tier has a scale of its own. "
        "Diamonds are greedy thoughts. Where the lower line is the one after a thought, thinking costs accuracy.",
        [f"{run.stage(iteration, 'evaluate').folder}/result.json" for iteration in rows],
    )


def _draw_pair(axes: Any, before: Reasoning, after: Reasoning) -> None:
    for label, color, offset, pair in (
        ("predicted directly", DIRECT_COLOR, -0.06, (before.direct, after.direct)),
        ("after a sampled thought", STAGE_COLORS["rmt"], 0.06, (before.thought, after.thought)),
    ):
        axes.errorbar(
            [offset, 1 + offset],
            [measured.value for measured in pair],
            yerr=[[_down(measured) for measured in pair], [_up(measured) for measured in pair]],
            color=color,
            marker="o",
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=3,
            label=label,
        )
    places = [(x, model.greedy.value) for x, model in ((0.18, before), (1.18, after)) if model.greedy]
    if places:
        style = {"color": "white", "markeredgecolor": STAGE_COLORS["rmt"], "markersize": 5, "zorder": 5}
        axes.plot(*zip(*places), "D", label="after a greedy thought", **style)


def _down(measured: Estimate) -> float:
    return 0.0 if measured.low is None else max(0.0, measured.value - measured.low)


def _up(measured: Estimate) -> float:
    return 0.0 if measured.high is None else max(0.0, measured.high - measured.value)


def accuracy_card(run: Run, iteration: int) -> Card | None:
    """The model RMT starts from and those after it on the same positions, hardest tier first; None without RMT's."""
    stage = run.stage(iteration, "evaluate")
    if not before_and_after(run, iteration):
        return None
    names, rows, positions = dict(MODEL_NAMES), [], []
    if run.stage(iteration, "rmt").is_rmt_baseline:
        names["rmt"] = "after next-token prediction"
    models = MODELS[MODELS.index(start_model(stage.metrics)) :]
    for tier in reversed(TIERS):
        measured = {model: Reasoning.read(stage.metrics, model, tier) for model in models}
        measured = {model: reasoning for model, reasoning in measured.items() if reasoning is not None}
        for model, reasoning in measured.items():
            rows.append([f"{tier}: {names[model]}", *_cells(reasoning)])
        if measured:
            positions.append(f"{next(iter(measured.values())).positions:,} {tier}")
    return Card(
        f"Iteration {iteration}: next-token accuracy on the same held-out positions, before and after",
        f"{', '.join(positions)} positions, the same for every model, in the tiers that RMT sets. Thoughts are asked "
        "for as in RMT's last step; a response that does not close its thought counts as wrong.",
        Table(
            ["tier: model", "directly", "after a thought", "after a greedy thought", "thought, tokens", "closed"],
            rows,
            [f"{stage.folder}/result.json"],
        ),
    )


def _cells(reasoning: Reasoning) -> list[str]:
    length, formed = reasoning.think_length, reasoning.format_rate
    return [
        share(reasoning.direct),
        share(reasoning.thought),
        share(reasoning.greedy),
        "–" if length is None else f"{length:.1f}",
        "–" if formed is None else f"{100 * formed:.1f} %",
    ]


def paper_card(run: Run) -> Card | None:
    """The paper's claims beside the run's figures of the same kind; None before a stage of RMT has finished."""
    stages = [stage for stage in run.stages if stage.name == "rmt" and stage.has_reasoning and stage.status == "done"]
    if not stages:
        return None
    pairs = [before_and_after(run, stage.iteration).get("hard") for stage in stages]
    lengths = [ThoughtLength.read(stage) for stage in stages]
    rows = [
        [
            "right after a thought, relative change",
            *("–" if pair is None else _relative(*pair) for pair in pairs),
            "up to +64.91 %",
        ],
        [
            "length of thoughts",
            *("–" if length is None else _length_ratio(length) for length in lengths),
            "21 % of the state of the art's",
        ],
        [
            "mean thought, tokens",
            *("–" if length is None else f"{length.end:.1f} at the end" for length in lengths),
            "RPT 872, Qwen3-14B 1,577 (secondary)",
        ],
        ["after post-training, mathematics", *("–" for _ in stages), "up to +18.76 %"],
        ["compared with", *("annealed model" for _ in stages), "state of the art"],
        ["models", *(run.name for _ in stages), "R1-Distill-Qwen-14B, Qwen3-14B"],
    ]
    header = ["", *(f"iteration {stage.iteration}" for stage in stages), "the paper (arXiv 2509.24375)"]
    sources = [f"{stage.folder}/metrics.jsonl" for stage in stages]
    sources += [
        f"{run.stage(stage.iteration, 'evaluate').folder}/result.json"
        for stage, pair in zip(stages, pairs)
        if pair is not None
    ]
    return Card(
        "Beside the paper's own figures, which are not comparable in scale",
        "The last column is what the paper's abstract and, where marked, secondary sources report: language modelling "
        "with other models on other text (OmniMATH), compared with other methods. This run's columns compare RMT's "
        "model with the annealed model it started from, on held-out hard tokens, and thoughts at the end of RMT with "
        "those at its start. Relative changes of a small share are large. What RMT brings after post-training needs "
        "a second run without it.",
        Table(header, rows, sources),
    )


def _relative(before: Reasoning, after: Reasoning) -> str:
    old, new = before.thought.value, after.thought.value
    shares = f"{100 * old:.1f} to {100 * new:.1f} %"
    return f"{100 * (new / old - 1):+.1f} % ({shares})" if old else shares


def _length_ratio(length: ThoughtLength) -> str:
    return f"{100 * length.end / length.start:.0f} % of the start's" if length.start else "no thoughts at the start"
