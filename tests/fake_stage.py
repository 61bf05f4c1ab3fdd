"""Stands in for a stage's process in tests of the state machine: notes that it ran, then leaves a result.

A file ``plan.json`` in the run folder maps "iteration/stage" to what goes wrong: an exit status, "hang"
(after a checkpoint), "no result", or "refused" (wrong input, as it looks from outside torchrun).
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
    resumed = (folder / "begun").exists()
    (folder / "begun").write_text("")
    with (run / "ran.txt").open("a") as ran:
        ran.write(f"{name}{' resumed' if resumed else ''}\n")
    for role, value in job["inputs"].items():
        assert (run / value).is_dir(), (role, value)
    plan = run / "plan.json"
    fault = json.loads(plan.read_text()).get(name) if plan.exists() else None
    if fault == "hang":
        (run / "worker.pid").write_text(str(os.getpid()))
        time.sleep(120)
    if isinstance(fault, int):
        return fault
    if fault == "refused":
        (folder / "log").mkdir(exist_ok=True)
        (folder / "log" / "refused").write_text("wrong input\n")
        return 1
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
