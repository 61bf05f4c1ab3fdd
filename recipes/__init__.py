"""Recipes: functions that return a complete Recipe. This folder installs as ``nemo_rmt.recipes``.

Beside each function's file stands NAME.yaml, which shows every value: what ``nemo-rmt recipes show NAME`` prints.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from nemo_rmt.recipes.olmo2_1b import olmo2_1b
from nemo_rmt.recipes.qwen3_14b import qwen3_14b
from nemo_rmt.recipes.r1_distill_qwen_14b import r1_distill_qwen_14b
from nemo_rmt.recipes.reasoning import reasoning
from nemo_rmt.recipes.small import small
from nemo_rmt.recipes.smollm3_3b import smollm3_3b
from nemo_rmt.recipes.tiny import tiny

from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError

RECIPES: dict[str, Callable[[], Recipe]] = {
    each.__name__: each for each in (tiny, small, reasoning, olmo2_1b, smollm3_3b, qwen3_14b, r1_distill_qwen_14b)
}
"""Every recipe by name, from small to large. Adding one is a file beside this one and a line here."""


def names() -> list[str]:
    """Names of all recipes."""
    return list(RECIPES)


def build(name: str) -> Recipe:
    """A fresh recipe. Raises UserError for an unknown name."""
    return _factory(name)()


def summary(name: str) -> str:
    """What a recipe is, in one line."""
    return inspect.getdoc(_factory(name)).splitlines()[0]


def about(name: str) -> str:
    """What a recipe is, and which of its values are a paper's: the docstring of its file."""
    return inspect.getdoc(inspect.getmodule(_factory(name)))


def _factory(name: str) -> Callable[[], Recipe]:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"known recipes: {', '.join(names())}; a YAML file goes after --yaml"
        )
        raise UserError(f"unknown recipe {name!r}: {hint}")
    return RECIPES[name]
