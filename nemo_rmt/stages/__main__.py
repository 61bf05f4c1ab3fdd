"""One rank of a stage: ``python -m nemo_rmt.stages STAGE.yaml``, alone, or with RANK and the rest in its environment.

Exit status: see ``nemo_rmt.exit_codes``. Everything that goes wrong, and every warning, is in ``log/rank_N.log`` of the
stage's folder; why a rank ended is also with its beats, where those who watch it look.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

from nemo_rmt import profiling, pulse, stopping
from nemo_rmt.errors import Diverged, UserError
from nemo_rmt.exit_codes import DISK_FULL, DIVERGED, DONE, FAILED, STOPPED, WRONG_INPUT
from nemo_rmt.manifest import is_disk_full
from nemo_rmt.process import die_with_parent
from nemo_rmt.stages.job import StageJob

BACKSTOP_S = 300
"""Seconds that a collective may take longer than a stage may stand still: the watchdog, which can name the rank, is
first."""

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
        stopping.install()
        job = StageJob.load(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    start_logging(path.parent / "log" / f"rank_{rank}.log")
    life = pulse.start(path.parent / pulse.BEATS, rank, pulse.beat_interval(job.recipe.cluster.hang_timeout_s))
    profiled = job.recipe.tracking.profile and rank == 0
    try:
        with profiling.stage(path.parent, f"{job.iteration}/{job.stage}", enabled=profiled):
            run(job, path.parent, rank, life)
        return DONE
    except stopping.Stopped as stopped:
        logging.info("stopped by %s", stopped)
        return STOPPED
    except UserError as error:
        life.fail(str(error))
        logging.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except Exception as error:
        life.fail(reason(error))
        logging.exception("stage %s failed on rank %d", job.stage, rank)
        traceback.print_exc()
        return status(error)
    finally:
        for child in multiprocessing.active_children():  # a checkpoint's writer, which Python would wait for
            child.kill()


def status(error: Exception) -> int:
    """The exit status that tells whether another start could help."""
    if is_disk_full(error):
        return DISK_FULL
    return DIVERGED if isinstance(error, Diverged) else FAILED


def reason(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def run(job: StageJob, folder: Path, rank: int, life: pulse.Pulse) -> None:
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
    pulse.tick("joining the other ranks")
    timeout = datetime.timedelta(seconds=job.recipe.cluster.hang_timeout_s + BACKSTOP_S)
    with distributed(job.recipe.parallel, job.recipe.seed, timeout) as layout:
        pulse.tick("loading models and data")
        try:
            algorithm.run(Session(job, folder, layout))
        except Exception as error:
            life.fail(str(error) if isinstance(error, UserError) else reason(error))  # before the others lose this rank
            raise


def start_logging(path: Path) -> None:
    """Send log records and warnings to this rank's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    for text in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
