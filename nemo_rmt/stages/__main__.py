"""Run one stage: ``python -m nemo_rmt.stages STAGE.yaml``, alone or under torchrun.

Exit status: 0 done, 2 wrong input (nothing was trained), 1 failed. Everything that goes wrong, and every warning, is in
``log/rank_N.log`` of the stage's folder.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

from nemo_rmt.errors import UserError
from nemo_rmt.process import REFUSAL, WRONG_INPUT, die_with_parent
from nemo_rmt.stages.job import StageJob

# Megatron-Core says on import which optional packages it does without; here they are left out on purpose.
EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
)


def main(argv: list[str]) -> int:
    """Run the stage named by a stage.yaml and return the exit status."""
    if len(argv) != 1:
        print("usage: python -m nemo_rmt.stages STAGE.yaml", file=sys.stderr)
        return WRONG_INPUT
    path, rank = Path(argv[0]).absolute(), int(os.environ.get("RANK", "0"))
    die_with_parent()
    try:
        job = StageJob.load(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    start_logging(path.parent / "log" / f"rank_{rank}.log")
    try:
        run(job, path.parent, rank)
    except UserError as error:
        logging.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        (path.parent / REFUSAL).write_text(f"{error}\n", encoding="utf-8")
        return WRONG_INPUT
    except Exception:
        logging.exception("stage %s failed on rank %d", job.stage, rank)
        traceback.print_exc()
        return 1
    finally:
        for child in multiprocessing.active_children():  # a checkpoint's writer, which Python would wait for
            child.kill()
    return 0


def run(job: StageJob, folder: Path, rank: int) -> None:
    """Dispatch to the stage's algorithm. Preparing data needs one process and no process group."""
    if job.stage == "data":
        from nemo_rmt.stages import data

        if rank == 0:
            data.run(job, folder)
        return
    import torch

    from nemo_rmt.megatron.runtime import distributed
    from nemo_rmt.stages.session import Session

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    algorithm = importlib.import_module(f"nemo_rmt.stages.{job.stage}")
    with distributed(job.recipe.parallel, job.recipe.seed) as layout:
        algorithm.run(Session(job, folder, layout))


def start_logging(path: Path) -> None:
    """Send log records and warnings to this rank's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    for text in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
