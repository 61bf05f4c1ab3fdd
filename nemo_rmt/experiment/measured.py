"""What one arm of an experiment measured with one seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One arm of one seed, all of its stages done.

    metrics: of the evaluate stages, as ``iteration_K/NAME``. tokens: trained on by the whole chain, sampled ones
    included. flops: of the whole chain; training counts 3 forwards, a reference's scoring and sampling 1. curves: of
    the last iteration's anneal, NAME -> step -> value: ``anneal@STEP/NAME``, and at its last step ``anneal/NAME``.
    folder: the arm's run folder, a view of stages that others may share.
    """

    arm: str
    seed: int
    metrics: dict[str, float]
    tokens: float
    flops: float
    curves: dict[str, dict[int, float]]
    folder: Path


def curve_name(metric: str) -> str:
    """What ``curves`` calls the metric ``iteration_K/anneal/NAME``, or ``iteration_K/NAME`` where the anneal is the
    iteration's last stage: NAME."""
    return metric.partition("/")[2].removeprefix("anneal/")
