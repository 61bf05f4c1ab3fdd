"""RMT's dynamic token budget: how many tokens the model may think, step by step (arXiv 2509.24375)."""

from __future__ import annotations

import math

from nemo_rmt.objectives.progress import progress


def token_budget(step: int, total_steps: int, *, initial: int = 800, minimum: int = 1, decay: float = 0.2) -> int:
    """B_t = max(minimum, ⌊initial · decay^(step / total_steps)⌋), in tokens inside ``<think></think>``.

    step, total_steps: finished steps and the stage's length; B is ``initial`` at 0 and ``initial · decay`` at the end.
    initial, minimum: B_0 and B_min, tokens. decay: γ, in (0, 1), over the whole stage.

    The formula and the defaults are the paper's (B_0 800, B_min 1, γ 0.2); rounding down is ours, because the budget
    is written into the prompt as a number of tokens.
    Raises ValueError for other ranges, minimum above initial, or a step outside [0, total_steps].
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
    if not 1 <= minimum <= initial:
        raise ValueError(f"minimum must be at least 1 and at most initial={initial}, got {minimum}")
    # Rounded first: 100 · 0.29 is 28.999999999999996 in binary, and 29 is meant.
    return max(minimum, math.floor(round(initial * decay ** progress(step, total_steps), 9)))
