"""Run several stage.yaml files of one layout in these ranks, then sample from the last one's starting checkpoint.

usage: stages_worker.py OUT.json STAGE.yaml ...
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import nemo_rmt.stages.session as session_module
from nemo_rmt.data.tasks import ChainTask
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import Sampling
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages import data
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session


class DigitsTask(ChainTask):
    """Chains scored by the share of digits: an untrained model gets a signal, so that GRPO has a gradient."""

    def score(self, problem, response: str) -> float:
        return sum(character.isdigit() for character in response) / max(1, len(response))


def sample(session: Session) -> list[list]:
    """Tokens and log-probabilities of responses to prompts of several lengths, sampled and greedy."""
    model = session.frozen_model(session.require_input("checkpoint"))
    engine = InProcessEngine(model.modules, 4)
    prompts = [[index + 5] * (3 + index % 3) for index in range(8)]
    results = []
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9), (0.0, 1.0)):
        sampling = Sampling(10, frozenset({session.tokenizer.eod}), seed=7, temperature=temperature, top_p=top_p)
        rollouts = engine.generate(prompts, list(range(8)), sampling)
        results += [[rollout.response, rollout.logprobs, rollout.finished] for rollout in rollouts]
    return results


def main(out: Path, stages: list[Path]) -> None:
    """All stages in one process group: joining a second one under torchrun finds the first one's addresses."""
    session_module.make_task = DigitsTask
    jobs = [StageJob.load(stage) for stage in stages]
    with distributed(jobs[0].recipe.parallel, jobs[0].recipe.seed) as layout:
        for job, stage in zip(jobs, stages, strict=True):
            if job.stage == "data":
                data.run(job, stage.parent)
                continue
            session = Session(job, stage.parent, layout)
            importlib.import_module(f"nemo_rmt.stages.{job.stage}").run(session)
        sampled = sample(session)
        if layout.rank == 0:
            out.write_text(json.dumps(sampled))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
