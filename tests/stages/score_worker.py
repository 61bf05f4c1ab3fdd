"""Run stages of one layout in these ranks, with small blocks.

usage: score_worker.py BLOCK_TOKENS KILL_AFTER STAGE.yaml ...

KILL_AFTER: files after which the process is killed, 0: never. Every file of a block that is written is noted in the
cache's written.txt.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from nemo_rmt.data import cache_blocks, logprob_cache
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session


def main(block_tokens: int, kill_after: int, stages: list[Path]) -> None:
    cache_blocks.BLOCK_TOKENS = block_tokens
    write, written = logprob_cache.write_block, []

    def noted(path: Path, *given) -> None:
        if kill_after and len(written) == kill_after:
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".tmp").write_bytes(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *given)
        written.append(path.name)
        with open(path.parent.parent / "written.txt", "a") as note:
            note.write(f"{path.parent.name}/{path.name}\n")

    logprob_cache.write_block = noted
    jobs = [StageJob.load(stage) for stage in stages]
    with distributed(jobs[0].recipe.parallel, jobs[0].recipe.seed) as layout:
        for job, stage in zip(jobs, stages, strict=True):
            importlib.import_module(f"nemo_rmt.stages.{job.stage}").run(Session(job, stage.parent, layout))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
