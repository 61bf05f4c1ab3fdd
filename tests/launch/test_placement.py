"""Where this process stands among the nodes of a job step."""

from __future__ import annotations

import pytest

from nemo_rmt.errors import UserError
from nemo_rmt.launch.placement import Placement

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n2",
    "SLURM_RESTART_COUNT": "3",
    "MASTER_ADDR": "10.0.0.1",
}


def test_srun_says_which_node_this_is():
    assert Placement.here(STEP) == Placement(2, 1, "n2", "10.0.0.1", "7.3.2", 3)


def test_a_machine_without_a_job_step_is_alone_also_in_a_batch_script():
    batch = {name: value for name, value in STEP.items() if "STEP" not in name}
    alone = Placement.here(batch)
    assert (alone.nodes, alone.node, alone.step, alone.requeued) == (1, 0, "", 0)
    alone.require(1)


@pytest.mark.parametrize(
    ("environment", "nodes", "message"),
    [
        ({}, 2, "cluster.nodes=2, but this is one machine.*--ntasks-per-node=1.*cluster.nodes=1"),
        (STEP, 4, "cluster.nodes=4, but srun started nemo-rmt on 2 node"),
        (STEP, 1, "cluster.nodes=1, but srun started nemo-rmt on 2 node"),
    ],
)
def test_a_recipe_for_other_nodes_is_refused(environment, nodes, message):
    with pytest.raises(UserError, match=message):
        Placement.here(environment).require(nodes)


def test_more_tasks_than_nodes_are_refused():
    with pytest.raises(UserError, match="started nemo-rmt 4 times on 2 node.*--ntasks-per-node=1"):
        Placement.here({**STEP, "SLURM_STEP_NUM_TASKS": "4"})
