"""Recipes: functions that return a complete Recipe. This folder installs as ``nemo_rmt.recipes``."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from nemo_rmt.recipes.small import small
from nemo_rmt.recipes.tiny import tiny

from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError

RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny, "small": small}
"""Every recipe by name. Adding one is a file beside this one and a line here."""


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(RECIPES)


def build(name: str) -> Recipe:
    """A fresh recipe. Raises UserError for an unknown name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"known recipes: {', '.join(names())}; a YAML file goes after --yaml"
        )
        raise UserError(f"unknown recipe {name!r}: {hint}")
    return RECIPES[name]()
