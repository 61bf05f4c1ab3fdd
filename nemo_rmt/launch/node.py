"""What one ``nemo-rmt`` does on its node: lead or follow, until it is over or a signal ends it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from nemo_rmt import stopping
from nemo_rmt.config import Recipe
from nemo_rmt.exit_codes import STOPPED
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.placement import Placement
from nemo_rmt.launch.stage import Command, follow
from nemo_rmt.process import Interrupted, signals_raise


def take_part(
    run_dir: Path,
    recipe: Recipe,
    command: Command,
    *,
    lead: Callable[[Meeting], int],
    check: Callable[[], None],
    anywhere: bool = False,
) -> int:
    """Run ``lead`` on the first node and follow it on the others; returns the exit status.

    Args:
        lead: called with the meeting of all nodes; returns an exit status.
        check: raises UserError when another node cannot take part.
        anywhere: one process does the work, so that one machine will do, whatever cluster.nodes says.

    Raises UserError when the nodes are not those of the recipe, or do not all see ``run_dir``.
    """
    placement = Placement.here()
    if not anywhere or placement.nodes > 1:
        placement.require(recipe.cluster.nodes)

    def part() -> int:
        if placement.node:
            return follow(run_dir, recipe, command, placement, check)
        with Meeting(run_dir, placement).open() as meeting:
            return lead(meeting)

    return until_signalled(part)


def until_signalled(work: Callable[[], int]) -> int:
    """What ``work`` returns, or the exit status that says which signal or request ended it."""
    try:
        with signals_raise(), stopping.catching():
            return work()
    except Interrupted as interrupted:
        print(f"nemo-rmt: stopped by {interrupted}; start it again to continue", file=sys.stderr)
        return 128 + interrupted.signum
    except stopping.Stopped as stopped:
        print(f"nemo-rmt: stopped by {stopped}; start it again to continue", file=sys.stderr)
        return STOPPED
