"""Which optimizer steps are taken: none whose loss or gradient is not finite, and no spikes where the recipe says so.

A spike is a loss or gradient norm above mean + k · standard deviation of the last WINDOW steps, as OLMo-core's
SkipStepOptimizer has it with k = 6 and a window of 128. What differs:

* Only steps that were taken are in the window. One spike does not widen the limit for the next, and a level that has
  risen for good ends the stage after ``optim.max_skipped`` steps, for a person to look at.
* The loss is judged while all losses of the window are above 0, as a likelihood's are. A policy gradient's loss is near
  0 and of either sign by construction, and its size says nothing about the run.
* Steps without any gradient (no group had a signal) stay out of the window: the next step with one would be a spike.
* A window whose values hardly differ counts as having a deviation of SMALLEST_DEVIATION · its mean.

There is no limit by default. Gradient norms of small batches have heavy tails: over 39,000 healthy steps of models of a
million parameters, k = 6 would skip one step in a hundred, at up to 65 deviations. Clipping already bounds those.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

WINDOW = 128
"""Steps that a spike is measured against."""
FULL_ENOUGH = WINDOW // 2
"""Steps in the window before there is a limit: fewer say too little about the deviation, and training begins steep."""
SMALLEST_DEVIATION = 0.01
"""Of the mean."""


@dataclass(frozen=True)
class Skipped:
    """A step that was not taken. Values that are not finite are infinite."""

    reason: str
    loss: float
    grad_norm: float


class Guard:
    """Judges every step of a stage before its update; must be given the same numbers on every rank.

    Args:
        skip_spikes: deviations above the mean at which a step is a spike; None: only what is not finite is skipped.
    """

    def __init__(self, skip_spikes: float | None):
        self.skip_spikes = skip_spikes
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.grad_norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped_steps = 0
        """Over the whole stage."""
        self.in_a_row = 0
        self._unreported: list[Skipped] = []

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether to take the step with this loss and global gradient norm."""
        reason = self._reason_to_skip(loss, grad_norm)
        if reason is not None:
            self.skipped_steps, self.in_a_row = self.skipped_steps + 1, self.in_a_row + 1
            self._unreported.append(Skipped(reason, loss, grad_norm))
            return False
        self.in_a_row = 0
        if grad_norm:
            self.losses.append(loss)
            self.grad_norms.append(grad_norm)
        return True

    def report(self) -> list[Skipped]:
        """The steps skipped since the last report."""
        skipped, self._unreported = self._unreported, []
        return skipped

    def state(self) -> dict[str, Any]:
        """What a resumed stage needs to decide the same."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "skipped_steps": self.skipped_steps,
            "in_a_row": self.in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self.losses, self.grad_norms = (deque(state[name], WINDOW) for name in ("losses", "grad_norms"))
        self.skipped_steps, self.in_a_row = state["skipped_steps"], state["in_a_row"]

    def _reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is not finite"
        if self.skip_spikes is None or len(self.grad_norms) < FULL_ENOUGH:
            return None
        judged = [("gradient norm", grad_norm, self.grad_norms)]
        if min(self.losses) > 0:
            judged.insert(0, ("loss", loss, self.losses))
        for name, value, window in judged:
            mean = statistics.fmean(window)
            deviation = max(statistics.stdev(window), SMALLEST_DEVIATION * mean)
            if value > mean + self.skip_spikes * deviation:
                return (
                    f"the {name} {value:.4g} is {(value - mean) / deviation:.1f} deviations of {deviation:.4g} above "
                    f"{mean:.4g}, the mean of the last {len(window)} steps"
                )
        return None
