"""Stands in for a stage's process in tests of the state machine: notes that it ran, then leaves a result.

A file ``plan.json`` in the run folder maps "iteration/stage" to what goes wrong: an exit status, "hang", "no result",
{"save": STEP, "exit": STATUS} after a checkpoint, or a list of these, one for each start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import yaml
from fake_checkpoint import write_checkpoint


def main(stage_yaml: Path) -> int:
    job, folder = yaml.safe_load(stage_yaml.read_text()), stage_yaml.parent
    run = (folder / job["run_dir"]).resolve()
    name = f"{job['iteration']}/{job['stage']}"
    begun = folder / "begun"
    resumed = begun.exists()
    starts = len(begun.read_text()) if resumed else 0
    begun.write_text("." * (starts + 1))
    with (run / "ran.txt").open("a") as ran:
        ran.write(f"{name}{' resumed' if resumed else ''}\n")
    for role, value in job["inputs"].items():
        assert (run / value).is_dir(), (role, value)
    plan = run / "plan.json"
    fault = json.loads(plan.read_text()).get(name) if plan.exists() else None
    if isinstance(fault, list):
        fault = fault[starts] if starts < len(fault) else None
    if isinstance(fault, dict):
        write_checkpoint(folder / "checkpoints" / f"step_{fault['save']:08d}", job["recipe"]["model"])
        fault = fault["exit"]
    if fault == "hang":
        (run / "worker.pid").write_text(str(os.getpid()))
        time.sleep(120)
    if isinstance(fault, int):
        return fault
    if fault == "no result":
        return 0
    checkpoint = None
    if job["stage"] not in ("data", "evaluate"):
        step = folder / "checkpoints" / "step_00000001"
        if not step.exists():
            write_checkpoint(step, job["recipe"]["model"])
        checkpoint = step.relative_to(run).as_posix()
    result = {"status": "done", "metrics": {"train/loss": 1.5}, "checkpoint": checkpoint, "wall_s": 0.1, "tokens": 1}
    (folder / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
