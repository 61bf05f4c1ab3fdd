"""small: tiny's model and text, set up to measure mid-training: one iteration, more held-out positions."""

from __future__ import annotations

from nemo_rmt.recipes.tiny import tiny

from nemo_rmt.config import Recipe


def small() -> Recipe:
    """What the experiment rmt_vs_baselines begins with."""
    recipe = tiny()
    recipe.name, recipe.run_dir, recipe.iterations = "small", "runs/small", 1
    recipe.evaluate.positions = 300
    return recipe
