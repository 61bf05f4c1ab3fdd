"""Where the time of a small flywheel goes: the recipe tiny with few steps, profiled, a line per stage and one for all.

    python benchmarks/flywheel_parts.py [--quick]

Steps are few, so that start-up weighs more than in a real run: "per_step" is what carries over, in seconds by part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from measuring import emit

from nemo_rmt.chain import plan_chain
from nemo_rmt.profiling import PARTS
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.run_folder import RunFolder

STEPS = {"pretrain": 60, "anneal": 20, "rmt": 8, "sft": 8, "rl": 8}
QUICK = [
    *(f"{stage}.steps=1" for stage in STEPS),
    *(f"data.corpora.{index}.num_documents=300" for index in range(4)),
    *(f"data.corpora.{index}.held_out=0.2" for index in range(4)),
    "rmt.enabled=false",
    "sft.enabled=false",
    "rl.global_batch_size=64",
    "rollout.max_new_tokens=8",
    "evaluate.problems=4",
    "evaluate.max_tokens=1024",
]


def main() -> None:
    """Run the flywheel once in a folder of its own and print what its stages left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step of most stages, on little data")
    settings = QUICK if parser.parse_args().quick else [f"{stage}.steps={steps}" for stage, steps in STEPS.items()]
    with tempfile.TemporaryDirectory() as folder:
        settings = [*settings, "iterations=1", f"run_dir={folder}/run"]
        command = [sys.executable, "-m", "nemo_rmt", "flywheel", "tiny", "--profile", *settings]
        subprocess.run(command, check=True, stdout=sys.stderr)
        run, total = RunFolder(Path(folder) / "run"), Counter()
        for planned in plan_chain(load_recipe("tiny", [], settings)):
            found = json.loads((run.stage_dir(planned.ref.iteration, planned.ref.stage) / PARTS).read_text())
            total.update(found["seconds"])
            emit("flywheel_parts", stage=planned.ref.stage, **_rounded(found))
        emit("flywheel_parts", stage="all", total_s=round(sum(total.values()), 2), seconds=_seconds(total))


def _rounded(found: dict) -> dict[str, object]:
    """Of one stage's parts.json: steps, seconds by part and, in the steps, seconds of each."""
    before, steps = found["before_first_step"], found["steps"]
    per_step = {
        name: round((seconds - before.get(name, 0.0)) / steps, 5)
        for name, seconds in found["seconds"].items()
        if steps and name not in ("start", "profiler")
    }
    return {
        "steps": steps,
        "total_s": round(found["total_s"], 2),
        "seconds": _seconds(found["seconds"]),
        "per_step": per_step,
    }


def _seconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in parts.items()}


if __name__ == "__main__":
    main()
