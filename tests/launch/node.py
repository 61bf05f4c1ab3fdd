"""One node's nemo-rmt, as srun would start it, with fake ranks: ``node.py RUN_DIR NODES``; prints the outcome."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nemo_rmt import stopping
from nemo_rmt.config import Cluster, Parallel, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.launch import meeting
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.placement import Placement
from nemo_rmt.launch.stage import follow, run_stage


def command(stage_yaml: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("fake_rank.py")), str(stage_yaml)]


def check() -> None:
    if unfit := os.environ.get("UNFIT"):
        raise UserError(unfit)


def main(run_dir: Path, nodes: int) -> int:
    meeting.ARRIVAL_S = 5.0
    cluster = Cluster(nodes=nodes, hang_timeout_s=float(os.environ.get("HANG_S", "60")))
    recipe = Recipe(cluster=cluster, parallel=Parallel(tensor=nodes))
    placement = Placement.here()
    with stopping.catching():
        if placement.node:
            return follow(run_dir, recipe, command, placement, check)
        with Meeting(run_dir, placement).open() as called, open(run_dir / "lock", "w") as lock:
            for stage in sorted(run_dir.glob("stage_*")):
                outcome = run_stage(stage / "stage.yaml", recipe, command, called, lock.fileno())
                print(json.dumps([outcome.status, outcome.reason, outcome.rank]), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
