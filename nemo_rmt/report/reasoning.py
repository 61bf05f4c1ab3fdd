"""What a run measured of RMT: predictions after a thought on held-out positions, and how long the thoughts were."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_rmt.config import TIERS
from nemo_rmt.report.estimates import Estimate, difference, estimate
from nemo_rmt.report.run import Run, StageRecord
from nemo_rmt.report.tables import prefix


@dataclass(frozen=True)
class Reasoning:
    """One model on the held-out positions of one tier.

    positions: how many. direct, thought: share predicted right without a thought, and after a sampled one.
    greedy: after a greedy one. think_length: mean tokens of a sampled thought. format_rate: share of the sampled
    responses that closed their thought and predicted something.
    """

    positions: int
    direct: Estimate
    thought: Estimate
    greedy: Estimate | None = None
    think_length: float | None = None
    format_rate: float | None = None

    @classmethod
    def read(cls, metrics: Mapping[str, float], model: str, tier: str) -> Reasoning | None:
        """From evaluate's metrics; None when the model was not measured there, or the tier has no positions."""
        base = f"{prefix(model)}tokens/{tier}/"
        positions = int(metrics.get(base + "positions", 0))
        direct, thought = estimate(metrics, base + "ntp"), estimate(metrics, base + "ntr")
        if not positions or direct is None or thought is None:
            return None
        return cls(
            positions,
            direct,
            thought,
            estimate(metrics, base + "ntr_greedy"),
            metrics.get(base + "think_length"),
            metrics.get(base + "format_rate"),
        )

    @property
    def right_when_formed(self) -> float | None:
        """Share right of the responses that closed their thought; None when none did or it was not recorded."""
        return self.thought.value / self.format_rate if self.format_rate else None


def start_model(metrics: Mapping[str, float]) -> str:
    """The model RMT started from: the annealed one, or without an anneal the pre-trained one."""
    return "anneal" if any(name.startswith("anneal/") for name in metrics) else "pretrain"


def before_and_after(run: Run, iteration: int) -> dict[str, tuple[Reasoning, Reasoning]]:
    """The model RMT started from and RMT's by tier, where both were measured."""
    metrics = run.stage(iteration, "evaluate").metrics
    start = start_model(metrics)
    pairs = {tier: (Reasoning.read(metrics, start, tier), Reasoning.read(metrics, "rmt", tier)) for tier in TIERS}
    return {tier: pair for tier, pair in pairs.items() if None not in pair}


ReasoningVerdict = Literal["better", "caught up", "sharpening", "undecided", "no change", "worse"]


def judge_reasoning(before: Reasoning, after: Reasoning) -> ReasoningVerdict:
    """What RMT did to one tier, from intervals alone.

    - worse: accuracy after a sampled thought fell. no change: it did not rise.
    - undecided: it rose, but greedy accuracy was not measured.
    - sharpening: it rose, but neither sampled nor greedy thoughts now lead to more than greedy ones did before: what
      the model could already do at its best, it now does more often.
    - caught up: they do, but not to more than the model before predicted directly.
    - better: to more than that as well.

    "Rose", "fell" and "more" mean that the 95 % interval of the difference excludes 0.
    """
    change = difference(before.thought, after.thought)
    if change.is_below_zero:
        return "worse"
    if not change.is_above_zero:
        return "no change"
    if before.greedy is None or after.greedy is None:
        return "undecided"
    best = (after.thought, after.greedy)
    if not any(difference(before.greedy, new).is_above_zero for new in best):
        return "sharpening"
    return "better" if any(difference(before.direct, new).is_above_zero for new in best) else "caught up"


@dataclass(frozen=True)
class ThoughtLength:
    """start, end: mean tokens of a thought in the first and the last tenth of RMT's steps. budget: the last step's
    B_t, None without one."""

    start: float
    end: float
    budget: float | None

    @classmethod
    def read(cls, stage: StageRecord) -> ThoughtLength | None:
        """From a stage that is done; None otherwise, and where no thoughts were logged."""
        _, lengths = stage.series("rmt/think_length")
        if stage.status != "done" or not lengths:
            return None
        _, budgets = stage.series("rmt/budget")
        tenth = max(1, len(lengths) // 10)
        start, end = statistics.fmean(lengths[:tenth]), statistics.fmean(lengths[-tenth:])
        return cls(start, end, budgets[-1] if budgets else None)
