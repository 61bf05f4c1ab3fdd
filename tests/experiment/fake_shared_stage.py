"""Stands in for a shared stage's processes: notes that it ran, then leaves numbers that follow from its stage.yaml.

A file ``plan.json`` in the output folder says what goes wrong, by stage: "fail", "hang" (until the stage's next start),
or a number of seconds to take.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_checkpoint import write_checkpoint  # noqa: E402

STEPS_OF_RL = 2
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # many are started


def main(stage_yaml: Path) -> int:
    job, folder = yaml.load(stage_yaml.read_text(), LOADER), stage_yaml.parent
    out = (folder / job["run_dir"]).resolve()
    plan = json.loads((out / "plan.json").read_text()) if (out / "plan.json").exists() else {}
    with (out / "ran.txt").open("a") as ran:
        ran.write(f"{folder.name}\n")
    begun = folder / "begun"
    fault = plan.get(job["stage"])
    if fault == "hang" and not begun.exists():
        begun.write_text(str(os.getpid()))
        time.sleep(120)
    if fault == "fail":
        print("nemo-rmt: no such luck")
        return 1
    if isinstance(fault, float):
        time.sleep(fault)
    for value in job["inputs"].values():
        assert (out / value).is_dir(), value
    leave(job, folder, out)
    return 0


def leave(job: dict, folder: Path, out: Path) -> None:
    """metrics.jsonl, a checkpoint and result.json."""
    stage, settings, tokens, checkpoint = job["stage"], job["recipe"].get(job["stage"], {}), 7, None
    read = {**job["recipe"], "cluster": None}
    number = int(hashlib.sha256(json.dumps([read, job["inputs"]]).encode()).hexdigest()[:6], 16) / 16**6
    metrics = {"train/loss": number}
    if stage == "data":
        metrics = {"tokenizer/vocab_size": 512, "data/programs/train_tokens": 1000}
    elif stage == "evaluate":
        metrics = {"lm/all/nll": number, "anneal/lm/all/nll": 2 * number, "anneal@5/lm/all/nll": 3 * number}
    else:
        steps = settings["steps"] if stage != "rl" else STEPS_OF_RL
        tokens = steps * settings["global_batch_size"] * settings["sequence_length"]
        per_step = {"rl/response_length": 3.0, "rl/zero_variance_groups": 0.5, "rmt/rollout_tokens": 50.0}
        with (folder / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                file.write(json.dumps({"step": step, "train/tokens": tokens * step / steps, **per_step}) + "\n")
        path = folder / "checkpoints" / "step_00000001"
        if not path.exists():
            write_checkpoint(path, job["recipe"]["model"])
        checkpoint = path.relative_to(out).as_posix()
    result = {"status": "done", "metrics": metrics, "checkpoint": checkpoint, "wall_s": 0.1, "tokens": tokens}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
