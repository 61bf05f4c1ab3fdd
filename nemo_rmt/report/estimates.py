"""Measured shares with their intervals, how they differ, and what a gain from RL means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1], or a difference of two, with its 95 % interval (None: not recorded)."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is; False without one."""
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is; False without one."""
        return self.high is not None and self.high < 0

    def as_share(self) -> str:
        """``47.1 % [44.0, 50.2]``."""
        interval = "" if self.low is None else f" [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{100 * self.value:.1f} %{interval}"

    def as_change(self) -> str:
        """``+9.4 points [+5.1, +13.7]``."""
        interval = "" if self.low is None else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * self.value:+.1f} points{interval}"


def difference(before: Estimate, after: Estimate) -> Estimate:
    """after − before with its interval from theirs (Newcombe 1998, method 10, which keeps lopsided intervals).

    It treats the two as independent. Both are measured on the same problems, which usually makes the true interval
    narrower.
    """
    change = after.value - before.value
    if None in (before.low, before.high, after.low, after.high):
        return Estimate(change)
    low = change - math.hypot(after.value - after.low, before.high - before.value)
    high = change + math.hypot(after.high - after.value, before.value - before.low)
    return Estimate(change, low, high)


@dataclass(frozen=True)
class Skill:
    """One model on one set of held-out problems.

    pass_at_1: share of samples at temperature 1 that are right. greedy: share of problems right without sampling.
    pass_at_k: share of problems with a right answer among k samples.
    """

    pass_at_1: Estimate
    greedy: Estimate | None = None
    pass_at_k: Estimate | None = None
    k: int | None = None

    @classmethod
    def read(cls, metrics: Mapping[str, float], prefix: str, task: str) -> Skill | None:
        """From evaluate's metrics; prefix "" for the final model or "sft/", ...; None when it was not measured."""
        base = f"{prefix}tasks/{task}/"
        pass_at_1 = estimate(metrics, base + "pass@1")
        if pass_at_1 is None:
            return None
        ks = [key.removeprefix(base + "pass@") for key in metrics if key.startswith(base + "pass@")]
        k = max((int(text) for text in ks if text.isdigit() and text != "1"), default=None)
        return cls(pass_at_1, estimate(metrics, base + "greedy"), estimate(metrics, f"{base}pass@{k}"), k)


def estimate(metrics: Mapping[str, float], key: str) -> Estimate | None:
    """A metric with its interval where that was recorded; None when it was not measured."""
    if key not in metrics:
        return None
    low, high = metrics.get(key + "_low"), metrics.get(key + "_high")
    return Estimate(metrics[key]) if low is None or high is None else Estimate(metrics[key], low, high)


Verdict = Literal["new skill", "sharpening", "undecided", "no change", "worse"]


def judge(before: Skill, after: Skill, before_longer: Skill | None, after_longer: Skill | None) -> Verdict:
    """What RL did to a task, from intervals alone; "longer" are problems longer than any trained on, or None.

    - worse: pass@1 fell. no change: pass@1 did not rise, on either set of problems.
    - sharpening: pass@1 rose, but on neither set does the model after RL, sampled or greedy, solve more than the
      model before RL solved greedily: what it could already do at its best, it now does more often.
    - new skill: on one of the sets it does solve more than that, and more than k samples before RL did.
    - undecided: it solves more than greedily before, but a right answer was already among k samples (or k samples
      were not taken), or greedy accuracy was not measured.

    "Rose", "fell" and "more" mean that the 95 % interval of the difference excludes 0.
    """
    pairs = [(before, after)]
    if before_longer is not None and after_longer is not None:
        pairs.append((before_longer, after_longer))
    changes = [difference(old.pass_at_1, new.pass_at_1) for old, new in pairs]
    if changes[0].is_below_zero:
        return "worse"
    beyond = [_solves_more(new, old.greedy) for old, new in pairs]
    if not any(change.is_above_zero for change in changes) and not any(beyond):
        return "no change"
    if any(old.greedy is None or new.greedy is None for old, new in pairs):
        return "undecided"
    if not any(beyond):
        return "sharpening"
    reached = [_solves_more(new, old.pass_at_k) for old, new in pairs]
    return "new skill" if any(more and new for more, new in zip(beyond, reached)) else "undecided"


def _solves_more(after: Skill, before: Estimate | None) -> bool:
    """Whether the later model, sampled or greedy, solves more than an earlier figure; False without that figure."""
    if before is None:
        return False
    measured = [after.pass_at_1] if after.greedy is None else [after.pass_at_1, after.greedy]
    return any(difference(before, new).is_above_zero for new in measured)
