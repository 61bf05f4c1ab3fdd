"""The page's plot of how far the sampler was from the trainer."""

from __future__ import annotations

from matplotlib.figure import Figure as Canvas

from nemo_rmt.report.drawing import ITERATION_COLORS, Figure, as_figure, curve
from nemo_rmt.report.run import Run

FACTOR, LARGEST = "rollout/token_mult_prob_error", "rollout/logprob_error_max"
FLOOR = 1e-8
"""What no difference at all is drawn as, on a logarithmic scale."""


def mismatch(run: Run) -> Figure | None:
    """The mean and the largest difference between the sampler's and the trainer's probabilities, step by step."""
    stages = [stage for stage in run.stages if stage.series(FACTOR)[0]]
    if not stages:
        return None
    canvas = Canvas(figsize=(10, 2.9), layout="constrained")
    mean, largest = canvas.subplots(1, 2)
    for stage in stages:
        color = ITERATION_COLORS[stage.iteration % len(ITERATION_COLORS)]
        label = f"iteration {stage.iteration}, {stage.name}"
        steps, factors = stage.series(FACTOR)
        curve(mean, steps, [max(factor - 1, FLOOR) for factor in factors], color, label)
        steps, errors = stage.series(LARGEST)
        curve(largest, steps, [max(error, FLOOR) for error in errors], color, None)
        for line in (mean.lines[-1], largest.lines[-1]):
            line.set_linestyle("--" if stage.name == "rmt" else "-")
    warning = float(run.setting("rollout", "mismatch_warning", default=1.05))
    mean.axhline(warning - 1, color="#b03a3a", linewidth=1, linestyle=":", label="warning")
    mean.set(title="Mean factor between their probabilities, less 1", xlabel="step")
    largest.set(title="Largest difference of log-probabilities, nats", xlabel="step")
    for axes in (mean, largest):
        axes.set_yscale("log")
    mean.legend(fontsize=8, ncols=2)
    return as_figure(
        canvas,
        "The sampler against the trainer",
        "Every sampled token has two probabilities: the sampler's, when it was drawn, and the trainer's, when it is "
        "trained on. With the same weights they differ by rounding alone; more means other weights, another precision "
        "or other text, and gradients that are no longer the policy's.",
        [f"{stage.folder}/metrics.jsonl" for stage in stages],
    )
