"""The arms of an experiment against its control, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from nemo_rmt.experiment.measured import Measured, curve_name

if TYPE_CHECKING:
    from nemo_rmt.experiment.config import Experiment, Metric
    from nemo_rmt.objectives.statistics import Interval

Verdict = Literal["better", "worse", "not distinguishable", "too few seeds"]

LEVEL = 0.1
"""Of the sign-flip test, which the bootstrap interval alone does not keep: of five seeds all must be on one side."""


@dataclass(frozen=True)
class Comparison:
    """One arm in one metric.

    values: by seed. differences: to the control, of the seeds that both have; {} for the control. steps: of the anneal
    until it reached what the same seed's control scored at its end, None where it never did; {} without curves.
    """

    arm: str
    control: str
    metric: Metric
    values: dict[int, float]
    differences: dict[int, float] = field(default_factory=dict)
    steps: dict[int, float | None] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @cached_property
    def interval(self) -> Interval | None:
        """The mean difference with its 95 % bootstrap interval; None where no seed has both."""
        # Here, because objectives import torch, which the driver is to do without until there is something to compare.
        from nemo_rmt.objectives.statistics import paired_bootstrap

        return paired_bootstrap(list(self.differences.values())) if self.differences else None

    @cached_property
    def p(self) -> float | None:
        """The differences' exact sign-flip p-value; None where no seed has both."""
        from nemo_rmt.objectives.statistics import sign_flip_p

        return sign_flip_p(list(self.differences.values())) if self.differences else None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the interval lies on one side of 0, and on which, and p is at most LEVEL; None where there is nothing
        to compare."""
        if self.interval is None:
            return None
        if 2 ** (1 - len(self.differences)) > LEVEL:
            return "too few seeds"
        if self.interval.low <= 0 <= self.interval.high or self.p > LEVEL:
            return "not distinguishable"
        return "better" if (self.interval.low > 0) == self.metric.higher_is_better else "worse"

    @property
    def median_steps(self) -> float | None:
        """Of ``steps`` over the seeds, where never counts as later than any; None when that is what it comes to, and
        without curves."""
        if not self.steps:
            return None
        median = statistics.median(math.inf if step is None else step for step in self.steps.values())
        return median if math.isfinite(median) else None


@dataclass(frozen=True)
class Cost:
    """What one arm took, means over its seeds. relative: FLOPs against the control's of the same seeds; None without
    one."""

    tokens: float
    flops: float
    relative: float | None


class Results:
    """What there is of an experiment so far.

    arms: arm -> seed -> what it measured, the control first. Raises ValueError for what is none of the experiment's, or
    there twice.
    """

    def __init__(self, experiment: Experiment, measured: Sequence[Measured]):
        self.experiment = experiment
        order = [experiment.control, *(arm for arm in experiment.arms if arm != experiment.control)]
        self.arms: dict[str, dict[int, Measured]] = {arm: {} for arm in order}
        for each in sorted(measured, key=lambda each: each.seed):
            if each.arm not in self.arms or each.seed not in experiment.seeds or each.seed in self.arms[each.arm]:
                raise ValueError(f"arm {each.arm}, seed {each.seed} is there twice, or not in the experiment")
            self.arms[each.arm][each.seed] = each

    @cached_property
    def comparisons(self) -> dict[str, list[Comparison]]:
        """Metric -> every arm."""
        return {metric.name: [self._compare(arm, metric) for arm in self.arms] for metric in self.experiment.metrics}

    def cost(self, arm: str) -> Cost | None:
        """None before a seed is done."""
        own, control = self.arms[arm], self.arms[self.experiment.control]
        if not own:
            return None
        ratios = [own[seed].flops / control[seed].flops for seed in own if seed in control]
        return Cost(
            statistics.fmean(each.tokens for each in own.values()),
            statistics.fmean(each.flops for each in own.values()),
            statistics.fmean(ratios) if ratios else None,
        )

    def _compare(self, arm: str, metric: Metric) -> Comparison:
        control = self.experiment.control
        values, base = (_values(self.arms[name], metric.name) for name in (arm, control))
        steps, name = {}, curve_name(metric.name)
        if metric.curve:
            steps = {
                seed: steps_to_reach(each.curves[name], base[seed], higher_is_better=metric.higher_is_better)
                for seed, each in self.arms[arm].items()
                if seed in base and each.curves.get(name)
            }
        shared = [] if arm == control else [seed for seed in values if seed in base]
        return Comparison(arm, control, metric, values, {seed: values[seed] - base[seed] for seed in shared}, steps)


def _values(seeds: Mapping[int, Measured], metric: str) -> dict[int, float]:
    """By seed, where it was measured and is finite."""
    found = {seed: each.metrics.get(metric, math.nan) for seed, each in seeds.items()}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def steps_to_reach(curve: Mapping[int, float], score: float, *, higher_is_better: bool) -> float | None:
    """The first step at which a curve is as good as a score; None when it never is.

    Between two measured steps it is taken to be a straight line; before the first one nothing is known, so that is the
    earliest answer.
    """
    before: tuple[int, float] | None = None
    for step in sorted(curve):
        ahead = curve[step] - score if higher_is_better else score - curve[step]
        if ahead >= 0:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * before[1] / (before[1] - ahead)
        if math.isfinite(ahead):
            before = step, ahead
    return None
