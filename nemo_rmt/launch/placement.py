"""Which node of how many this ``nemo-rmt`` runs on, from the environment of a Slurm job step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_rmt.errors import UserError


@dataclass(frozen=True)
class Placement:
    """This process's place among the ``nemo-rmt`` processes of one job step."""

    nodes: int = 1
    node: int = 0
    """Index of this node; 0 leads."""
    name: str = ""
    """Of this node, for messages."""
    address: str = "127.0.0.1"
    """Where the other nodes reach this one; of the leader only."""
    step: str = ""
    """Identity of the job step in this start of its job; empty outside of Slurm."""
    requeued: int = 0
    """Times that Slurm started the job again."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Placement:
        """From the variables that srun gives each task. Raises UserError when it started more than one on a node."""
        name = os.uname().nodename
        if "SLURM_STEP_ID" not in environment or "SLURM_STEP_NUM_NODES" not in environment:
            return cls(name=name)
        nodes, tasks = int(environment["SLURM_STEP_NUM_NODES"]), int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks != nodes:
            raise UserError(
                f"srun started nemo-rmt {tasks} times on {nodes} node(s): it starts a node's ranks itself, give srun "
                "--ntasks-per-node=1"
            )
        restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        job, step = environment.get("SLURM_JOB_ID", "0"), environment["SLURM_STEP_ID"]
        return cls(
            nodes=nodes,
            node=int(environment.get("SLURM_NODEID", "0")),
            name=environment.get("SLURMD_NODENAME", name),
            address="127.0.0.1" if nodes == 1 else environment.get("MASTER_ADDR", name),
            step=f"{job}.{restarts}.{step}",
            requeued=restarts,
        )

    @property
    def poll_s(self) -> float:
        """Seconds between two looks: all nodes together look at the shared folder some twenty times a second."""
        return min(0.05 * (self.nodes + 1), 2.0)

    def require(self, nodes: int) -> None:
        """Raise UserError unless ``cluster.nodes`` is what runs."""
        if nodes == self.nodes:
            return
        if not self.step:
            raise UserError(
                f"cluster.nodes={nodes}, but this is one machine: submit it (slurm/README.md), start one nemo-rmt on "
                "each node of a Slurm job with srun --ntasks-per-node=1, or set cluster.nodes=1"
            )
        raise UserError(
            f"cluster.nodes={nodes}, but srun started nemo-rmt on {self.nodes} node(s): set "
            f"cluster.nodes={self.nodes}, or give the job other nodes"
        )
