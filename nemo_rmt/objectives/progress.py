"""How far a stage is: what RMT's schedules depend on."""

from __future__ import annotations


def progress(step: int, total_steps: int) -> float:
    """step / total_steps, in [0, 1].

    step: finished steps; 0 for the first update, total_steps once training has ended.
    Raises ValueError unless total_steps is at least 1 and step lies in [0, total_steps].
    """
    if not total_steps >= 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be between 0 and total_steps={total_steps}, got {step}")
    return step / total_steps
