"""RMT's curriculum: from which difficulty tier the reasoned tokens are drawn, step by step (arXiv 2509.24375)."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rmt.objectives.progress import progress


def tier_probabilities(
    step: int,
    total_steps: int,
    *,
    early: Sequence[float] = (0.6, 0.3, 0.1),
    late: Sequence[float] = (0.1, 0.3, 0.6),
    transition: tuple[float, float] = (0.3, 0.7),
) -> tuple[float, ...]:
    """The probability of each tier at a step: ``early``, then a straight line, then ``late``.

    step, total_steps: finished steps and the stage's length.
    early, late: one probability per tier, easy to hard as :func:`~nemo_rmt.objectives.assign_tiers` numbers them;
        equal ones are the ablation without curriculum.
    transition: the shares of the stage at which the line starts and ends.

    The schedule and its bounds at 30 % and 70 % are the paper's; it does not publish the probabilities: (0.6, 0.3, 0.1)
    and (0.1, 0.3, 0.6) are ours. Raises ValueError for probabilities that are negative or do not sum to 1, lengths
    that differ, a transition that does not ascend within [0, 1], or a step outside [0, total_steps].
    """
    early, late = _require_probabilities("early", early), _require_probabilities("late", late)
    if len(early) != len(late):
        raise ValueError(f"early and late must have one probability per tier, got {len(early)} and {len(late)}")
    start, end = transition
    if not 0 <= start < end <= 1:
        raise ValueError(f"transition must be two ascending shares in [0, 1], got {tuple(transition)}")
    moved = min(max((progress(step, total_steps) - start) / (end - start), 0.0), 1.0)
    return tuple((1 - moved) * first + moved * last for first, last in zip(early, late, strict=True))


def _require_probabilities(name: str, values: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    # Looser than float64 rounding, so that thirds written as 0.333333 pass.
    if not all(value >= 0 for value in values) or not abs(sum(values) - 1) <= 1e-5:
        raise ValueError(f"{name} must be probabilities that sum to 1, got {values}, which sum to {sum(values):g}")
    return values
