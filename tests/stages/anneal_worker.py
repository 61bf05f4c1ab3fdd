"""Run the anneal stage with every objective, and write their steps.

usage: anneal_worker.py FOLDER RECIPE (as JSON) DATA_FOLDER LAYOUT. At the layout "one_rank" two models are trained
first, which all layouts take as start and reference. Rank 0 writes FOLDER/LAYOUT.json: a list of steps by objective.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nemo_rmt.config import Recipe
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages import anneal, pretrain, sft
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session
from nemo_rmt.tracking import WEIGHTS, read_metrics

STAGES = {"pretrain": pretrain, "anneal": anneal, "sft": sft}
START, TUNED = "pretrain/checkpoints/step_00000005", "sft/checkpoints/step_00000005"


def main() -> None:
    folder, recipe = Path(sys.argv[1]), Recipe.model_validate_json(sys.argv[2])
    data, name = sys.argv[3:]
    with distributed(recipe.parallel, recipe.seed) as layout:

        def run(stage: str, recipe: Recipe, target: Path, **inputs: str) -> Path:
            target.mkdir(parents=True, exist_ok=True)
            given = {"data": data} | {role: str(folder / path) for role, path in inputs.items()}
            STAGES[stage].run(Session(StageJob(stage=stage, iteration=1, inputs=given, recipe=recipe), target, layout))
            return target

        if name == "one_rank":
            run("pretrain", recipe, folder / "pretrain")
            run("sft", recipe, folder / "sft", checkpoint=START)
        steps = {}
        for objective in ("uniform", "remit", "rho1", "distill"):
            changed = recipe.model_copy(deep=True)
            changed.anneal.objective = objective
            changed.anneal.distill.coefficient = 0.7
            done = run("anneal", changed, folder / name / objective, checkpoint=START, reference=TUNED)
            if layout.rank == 0:
                steps[objective] = read_metrics(done / "metrics.jsonl")
                if (done / WEIGHTS).exists():
                    steps[f"{objective}/{WEIGHTS}"] = read_metrics(done / WEIGHTS)
        if layout.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
