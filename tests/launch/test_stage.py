"""A stage's ranks over one node and over two: how they begin, how they end, and what is said about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_rmt.launch.stage import judge
from nemo_rmt.pulse import Beat

NODE = Path(__file__).with_name("node.py")
LIMIT_S = 60


def plan(run: Path, *stages: list[str]) -> None:
    """What each rank of each stage does."""
    for number, words in enumerate(stages):
        folder = run / f"stage_{number}"
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(words))


def node(run: Path, index: int, nodes: int, **environment: str) -> subprocess.Popen:
    """Start one node's process."""
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(nodes),
        "SLURM_NODEID": str(index),
        "SLURMD_NODENAME": f"n{index}",
        "MASTER_ADDR": "127.0.0.1",
    }
    return subprocess.Popen(
        [sys.executable, str(NODE), str(run), str(nodes)],
        env={**os.environ, **step, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(processes: list[subprocess.Popen]) -> list[list]:
    """What the leader said about each stage, once all nodes have left."""
    outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("[")]


def two_nodes(run: Path, **environment: str) -> list[subprocess.Popen]:
    return [node(run, index, 2, **environment) for index in range(2)]


def wait_for(path: Path) -> dict:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return json.loads(path.read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_node_starts_its_ranks_of_one_stage_after_another(tmp_path):
    plan(tmp_path, ["exit 0", "exit 0"], ["exit 0", "exit 0"])
    assert outcomes(two_nodes(tmp_path)) == [[0, "", 0], [0, "", 0]]
    for stage in ("stage_0", "stage_1"):
        first, second = (json.loads((tmp_path / stage / f"place_{rank}.json").read_text()) for rank in (0, 1))
        assert (first["RANK"], second["RANK"]) == ("0", "1")
        assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "0")
        assert {first["WORLD_SIZE"], second["WORLD_SIZE"]} == {"2"}
        assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (second["MASTER_ADDR"], second["MASTER_PORT"])
        assert "rank 1 is here" in (tmp_path / stage / "log" / "rank_1.log").read_text()
    assert not (tmp_path / ".nodes").exists()


@pytest.mark.parametrize(
    ("words", "status", "reason", "rank"),
    [
        (["hang", "kill"], 1, "rank 1 (node n1) was killed by SIGKILL, perhaps for want of memory", 1),
        (["hang", "raise ValueError: no"], 1, "rank 1 (node n1): ValueError: no", 1),
        (["raise ValueError: no", "hang"], 1, "rank 0 (node n0): ValueError: no", 0),
        (["hang", "exit 3"], 1, "rank 1 (node n1) ended with exit status 3", 1),
        (["hang", "exit 2"], 2, "rank 1 (node n1): exit status 2", 1),
        (["exit 65", "kill"], 65, "rank 0 (node n0): exit status 65", 0),
    ],
)
def test_a_rank_that_fails_ends_all_ranks_and_is_named(tmp_path, words, status, reason, rank):
    plan(tmp_path, words)
    started = time.monotonic()
    assert outcomes(two_nodes(tmp_path)) == [[status, reason, rank]]
    assert time.monotonic() - started < 30
    for each in (0, 1):
        assert not alive(json.loads((tmp_path / "stage_0" / f"place_{each}.json").read_text())["pid"])


def test_a_stopped_rank_is_named_by_the_watchdog_and_ended(tmp_path):
    plan(tmp_path, ["hang", "hang"])
    nodes = two_nodes(tmp_path, HANG_S="4")
    pid = wait_for(tmp_path / "stage_0" / "place_1.json")["pid"]
    wait_for(tmp_path / "stage_0" / "log" / "beats" / "rank_1.json")
    time.sleep(0.5)
    os.kill(pid, signal.SIGSTOP)
    ((status, reason, rank),) = outcomes(nodes)
    assert (status, rank) == (1, 1) and "rank 1 (node n1) has not responded for" in reason
    assert not alive(pid)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_the_leader_reaches_its_ranks(tmp_path, signum):
    plan(tmp_path, ["stop"])
    (process,) = [node(tmp_path, 0, 1)]
    wait_for(tmp_path / "stage_0" / "log" / "beats" / "rank_0.json")
    process.send_signal(signum)
    assert outcomes([process]) == [[75, "", 0]]


def test_a_killed_leader_leaves_no_rank_behind(tmp_path):
    plan(tmp_path, ["hang"])
    process = node(tmp_path, 0, 1)
    pid = wait_for(tmp_path / "stage_0" / "place_0.json")["pid"]
    process.kill()
    process.communicate(timeout=LIMIT_S)
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_folder_that_another_node_does_not_see_is_refused_by_both(tmp_path):
    for name in ("here", "there"):
        plan(tmp_path / name, ["exit 0", "exit 0"])
    nodes = [node(tmp_path / "here", 0, 2), node(tmp_path / "there", 1, 2)]
    errors = [process.communicate(timeout=LIMIT_S)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [2, 2]
    assert "of 2 nodes, number 1 did not show up" in errors[0]
    assert "node n1 sees nothing there of the node that leads" in errors[1]
    assert all("file system that all nodes share" in error for error in errors)
    assert not list(tmp_path.glob("*/stage_0/place_*"))


def test_a_node_that_cannot_take_part_says_why_through_the_leader(tmp_path):
    plan(tmp_path, ["exit 0", "exit 0"])
    nodes = [node(tmp_path, 0, 2), node(tmp_path, 1, 2, UNFIT="it has 4 GPUs")]
    errors = [process.communicate(timeout=LIMIT_S)[1] for process in nodes]
    assert nodes[0].returncode == 2 and "node n1: it has 4 GPUs" in errors[0]
    assert not list((tmp_path / "stage_0").glob("place_*"))


def beat(failure: str | None = None, failed_at: float | None = None) -> Beat:
    return Beat(1, "n", 1, 1, "x", failure, failed_at)


def test_the_reason_left_first_counts_when_others_lose_their_connection():
    beats = {0: beat("RuntimeError: connection closed", 11.0), 1: beat("ValueError: bad row", 10.0)}
    outcome = judge({0: 1, 1: 1}, 2, beats, None)
    assert (outcome.status, outcome.rank, outcome.reason) == (1, 1, "rank 1 (node n): ValueError: bad row")


def test_a_full_disk_and_a_request_to_stop_are_told_from_a_crash():
    assert judge({0: 1, 1: 74}, 2, {1: beat("OSError: no space", 2.0), 0: beat("lost", 1.0)}, None).status == 74
    assert judge({0: 75, 1: 1}, 2, {}, None).status == 75
    assert judge({0: 0}, 2, {}, None).status == 1  # the other was ended by us: not done
