"""A flywheel whose stages are fakes: how to start them, and what of them ran."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_rmt.config import Recipe
from nemo_rmt.recipe_io import load_recipe

FAKE_STAGE = Path(__file__).with_name("fake_stage.py")
FIRST = ["0/data", "0/pretrain", "0/anneal", "0/rmt", "0/sft", "0/rl", "0/evaluate"]
SECOND = ["1/anneal", "1/rmt", "1/sft", "1/rl", "1/evaluate"]


def fake(stage_yaml: Path) -> list[str]:
    return [sys.executable, str(FAKE_STAGE), str(stage_yaml)]


def changed(recipe: Recipe, **values: object) -> Recipe:
    return recipe.model_copy(update=values, deep=True)


def ran(recipe: Recipe) -> list[str]:
    """What ran since the last call."""
    path = Path(recipe.run_dir) / "ran.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def small_chain(run_dir: Path) -> Recipe:
    """tiny without the standard library's text, in this folder."""
    return load_recipe("tiny", [], [f"run_dir={run_dir}", "data.corpora=[{name: programs, kind: chains}]"])
