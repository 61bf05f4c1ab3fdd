"""Stand-ins for Slurm's commands and for nemo-rmt: the scripts in slurm/ run with them on a machine without Slurm."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SLURM = Path(__file__).parents[1] / "slurm"
CHAIN = "0 data|0 pretrain|0 anneal|0 rmt|0 sft|0 rl|0 evaluate|1 anneal|1 rmt|1 sft|1 rl|1 evaluate".split("|")

STAND_INS = {
    # runs what follows its options once, in place of a task on every node
    "srun": """
        if [ "$1" = --help ]; then cat "$WORK/srun_help" 2>/dev/null; exit 0; fi
        echo "srun $*" >>"$WORK/calls"
        while [ "$1" != nemo-rmt ]; do shift; done
        exec "$@"
    """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") printf 'n1\\nn2\\n' ;;
            "show node") echo "NodeName=$3 NodeAddr=10.0.0.1 NodeHostName=host" ;;
            "show job") echo "   JobState=$(cat "$WORK/job_state") Reason=None" ;;
            *) echo "scontrol $*" >>"$WORK/calls" ;;
        esac
    """,
    "squeue": 'cat "$WORK/queue"',
    "sbatch": """
        case "$*" in *"$(cat "$WORK/refused")"*) echo 'sbatch: error: invalid partition' >&2; exit 1 ;; esac
        [ "$1" != --test-only ] || exit 0
        id=$(($(cat "$WORK/last_id") + 1)); echo $id >"$WORK/last_id"; echo $id
        echo "iteration=$ITERATION $*" >>"$WORK/submitted"
    """,
    "nemo-rmt": """
        case "$1" in
            status) cat "$WORK/status" ;;
            recipes) echo "run_dir: $WORK/run" ;;
            plan) echo "nemo-rmt $*" >>"$WORK/calls"; exit "$(cat "$WORK/plan")" ;;
            report) echo "nemo-rmt $*" >>"$WORK/calls" ;;
            stage) echo "nemo-rmt $* MASTER_ADDR=$MASTER_ADDR" >>"$WORK/calls"; . "$WORK/stage" ;;
            experiment) echo "nemo-rmt $*" >>"$WORK/calls"; . "$WORK/stage" ;;
        esac
    """,
}


@dataclass(frozen=True)
class Site:
    """A folder with the stand-ins and what they read and write."""

    work: Path

    @classmethod
    def at(cls, folder: Path) -> Site:
        """A new one, where nothing is done yet, nothing is queued, and every stage succeeds."""
        bin_folder = folder / "venv" / "bin"
        bin_folder.mkdir(parents=True)
        for name, text in STAND_INS.items():
            (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (bin_folder / name).chmod(0o755)
        made = cls(folder)
        made.write(job_state="RUNNING", queue="", last_id="100", plan="0", stage="exit 0", refused="nothing is")
        made.status()
        return made

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.work / name).write_text(text + "\n")

    def status(self, **done: str) -> None:
        """Stages of the run; those done by iteration: _0="data rmt"."""
        stages = [stage.split() for stage in CHAIN]
        self.write(
            status="\n".join(
                f"{k}\t{name}\t{'done' if name in done.get(f'_{k}', '') else 'pending'}" for k, name in stages
            )
        )

    def environment(self, **values: str) -> dict[str, str]:
        """What a job, or a login node, has besides."""
        bin_folder = self.work / "venv" / "bin"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        base = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "WORK": str(self.work),
            "VENV": str(self.work / "venv"),
            "NEMO_RMT_HOME": str(SLURM.parent),
            "RECIPE": "tiny",
            "RUN_DIR": str(self.work / "run"),
        }
        return {**kept, **base, **values}

    def job(self, script: str, *words: str, **values: str) -> tuple[int, list[str]]:
        """Run a batch script as a job on two nodes; its exit code and log."""
        allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        with (self.work / "log").open("w") as log:
            done = subprocess.run(
                ["bash", str(SLURM / f"{script}_14b.sh"), *words],
                env=self.environment(**allocation, **values),
                stdout=log,
                stderr=log,
                timeout=60,
                check=False,
            )
        return done.returncode, (self.work / "log").read_text().splitlines()

    def experiment(self, *words: str, **values: str) -> tuple[int, list[str]]:
        """Run a task of an experiment's array; its exit code and log."""
        task = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "n1"}
        with (self.work / "log").open("w") as log:
            command = ["bash", str(SLURM / "experiment.sh"), *words]
            environment = self.environment(**task, **values)
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=60, check=False)
        return done.returncode, (self.work / "log").read_text().splitlines()

    def flywheel(self, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SLURM / "flywheel_14b.sh"), *words],
            env=self.environment(**values),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def lines(self, name: str, word: str = "") -> list[str]:
        path = self.work / name
        return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []
