"""A plan as a person reads it, and whether the recipe can work."""

from __future__ import annotations

import textwrap

from rich.console import Console

from nemo_rmt.compatibility import model_vocab_size
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.overview import wide_console
from nemo_rmt.plan.checks import check_all
from nemo_rmt.plan.inputs import tokenizer_size
from nemo_rmt.plan.memory import GIB, STANDING, Memory, available, memory
from nemo_rmt.plan.parameters import model_vocabulary
from nemo_rmt.plan.search import changed_recipe, nearest_changes, written
from nemo_rmt.plan.step_time import step_time
from nemo_rmt.plan.table import PARTS, assumption_lines, layout_lines, memory_table, time_table
from nemo_rmt.plan.workload import Workload, workloads

FITS, CANNOT_WORK = 0, 2


def print_plan(recipe: Recipe) -> int:
    """Print everything; 0, or 2 when something has to change."""
    vocab_size = _vocabulary(recipe)
    findings = check_all(recipe, vocab_size)
    found = workloads(recipe)
    memories = {workload: memory(recipe, workload, vocab_size) for workload in found}
    times = {workload: step_time(recipe, workload, vocab_size) for workload in found}
    console = wide_console()
    for line in layout_lines(recipe, vocab_size, memories):
        console.print(line)
    console.print(memory_table(recipe, memories))
    console.print(time_table(times))
    _print_list(console, "Assumptions:", list(assumption_lines(recipe, found)))
    _print_list(console, "Before it can start:", findings.before)
    problems = findings.problems + memory_problems(recipe, memories)
    _print_list(console, "To change:", problems)
    if any(each.peak > available(recipe) for each in memories.values()):
        _print_changes(console, recipe, vocab_size)
    if problems:
        console.print(f"{recipe.name} cannot run like this: see what to change above.")
        return CANNOT_WORK
    most = max(each.peak for each in memories.values())
    console.print(
        f"{recipe.name} fits: {most / GIB:.1f} of {available(recipe) / GIB:.1f} GiB"
        + (", and can start once the above is done." if findings.before else ".")
    )
    return FITS


def memory_problems(recipe: Recipe, memories: dict[Workload, Memory]) -> list[str]:
    """Which part of which stage is too big, and by how much."""
    problems = []
    for workload, each in memories.items():
        over = each.peak - available(recipe)
        if over <= 0:
            continue
        rest = {
            "training": (each.training, ("activations", "layer" if each.layer > each.head else "head")),
            "sampling": (each.sampling, ("sampling",)),
            "update": (each.update, ("update",)),
        }
        moment, (_, parts) = max(rest.items(), key=lambda entry: entry[1][0])
        counted = sorted((*STANDING, *parts), key=lambda part: -getattr(each, part))
        sizes = ", ".join(f"{PARTS[part]} {getattr(each, part) / GIB:.1f}" for part in counted if getattr(each, part))
        problems.append(
            f"{workload.name} needs {each.peak / GIB:.1f} GiB at its peak, in {moment}, {over / GIB:.1f} more than a "
            f"GPU has: {sizes}"
        )
    return problems


def _vocabulary(recipe: Recipe) -> int:
    """Of the model, from the tokenizer where it is there; a tokenizer that disagrees is for the checks to refuse."""
    try:
        return model_vocab_size(recipe.model, tokenizer_size(recipe))
    except UserError:
        return model_vocabulary(recipe)


def _print_changes(console: Console, recipe: Recipe, vocab_size: int) -> None:
    """The nearest changes that fit."""
    changes = nearest_changes(recipe, vocab_size)
    lines = []
    for overrides in changes:
        changed = changed_recipe(recipe, overrides)
        most = max(memory(changed, workload, vocab_size).peak for workload in workloads(changed))
        lines.append(f"{written(overrides)}  ({most / GIB:.1f} GiB)")
    nothing = ["nothing near: use more or larger GPUs, or shorter rows (sequence_length)"]
    _print_list(console, "These would fit:", lines or nothing)


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        console.print(title)
        for line in lines:
            console.print(textwrap.fill(line, console.width, initial_indent="  ", subsequent_indent="    "))
