"""``nemo-rmt plan``: whether a recipe fits a cluster, and what it costs, before anything is started.

Everything is computed from the recipe. Nothing here imports torch or Megatron, so that it runs on a login node.
"""

from __future__ import annotations

from nemo_rmt.config import Recipe


def run_plan(recipe: Recipe) -> int:
    """Print layout, memory, time and what is missing; 0 when the recipe can work, 2 after saying what to change."""
    from nemo_rmt.plan.verdict import print_plan  # here: the overview, which this prints with, counts parameters

    return print_plan(recipe)
