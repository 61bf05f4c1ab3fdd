"""The test cluster itself: what it offers, and that it leaves nothing behind however its tests end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, environment

SLEEPER = "#!/bin/bash\nsrun --ntasks-per-node=1 setsid sleep 1000 & setsid sleep 1000 & wait\n"
"""A job whose processes leave their parents' sessions, on every node."""
STARTER = """
import signal, sys, time
from pathlib import Path
from slurm_cluster import SlurmCluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
with SlurmCluster() as cluster:
    job = cluster.submit(Path(sys.argv[1]), flags=("--nodes=2", "--output=/dev/null"))
    cluster.wait(job, "RUNNING", timeout=20)
    time.sleep(1)
    print(cluster.folder, flush=True)
    time.sleep(1000)
"""


def processes_of(cluster: Path) -> list[str]:
    """Command lines of processes that belong to a cluster: its daemons and its jobs all have its SLURM_CONF."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={cluster}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended since, or may not be looked at
    return found


def wait_until_gone(cluster: Path) -> None:
    """Fail unless every process and the folder of a cluster disappear within 20 seconds."""
    deadline = time.monotonic() + 20
    while (left := processes_of(cluster)) or cluster.exists():
        assert time.monotonic() < deadline, (left, cluster.exists())
        time.sleep(0.1)


@pytest.fixture
def sleeper(tmp_path) -> Path:
    script = tmp_path / "sleeper.sh"
    script.write_text(SLEEPER)
    return script


def test_nothing_is_left_when_the_tests_fail(sleeper):
    with pytest.raises(ZeroDivisionError), SlurmCluster() as cluster:
        job = cluster.submit(sleeper, flags=("--nodes=2", "--output=/dev/null"))
        cluster.wait(job, "RUNNING", timeout=20)
        raise ZeroDivisionError
    assert not processes_of(cluster.folder) and not cluster.folder.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_when_the_starter_is_ended_by(how, sleeper):
    command = [sys.executable, "-c", STARTER, str(sleeper)]
    starter = subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        folder = Path(starter.stdout.readline().strip())
        names = {Path(line.split()[0]).name for line in processes_of(folder) if line}
        assert names >= {"munged", "slurmctld", "slurmd", "slurmstepd:", "sleep"}
        starter.send_signal(how)
        starter.communicate(timeout=20)
    finally:
        starter.kill()
    wait_until_gone(folder)


def test_a_job_runs_on_both_nodes(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun --ntasks-per-node=1 bash -c 'echo node $SLURMD_NODENAME'\nexit 3\n")
    job = cluster.submit(script, flags=("--nodes=2", "--gpus-per-node=2", f"--output={tmp_path}/log.txt"))
    assert cluster.wait(job, timeout=20).exit_code == 3
    assert sorted(cluster.log(job).split("\n"))[1:] == ["node n1", "node n2"]


def test_a_requeued_job_starts_again_within_seconds(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n[ ${SLURM_RESTART_COUNT:-0} = 1 ] || sleep 1000\n")
    job = cluster.submit(script, flags=("--requeue", "--output=/dev/null"))
    cluster.wait(job, "RUNNING", timeout=20)
    cluster.slurm("scontrol", "requeue", job)
    cluster.release(job, timeout=20)
    assert cluster.wait(job, "COMPLETED", timeout=5).restarts == 1


def test_the_hidden_folder_is_another_one_on_the_second_node(cluster, tmp_path):
    (cluster.hidden / "note").touch()
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --ntasks-per-node=1 ls {cluster.hidden}\n")
    for node, seen in (("n1", "note\n"), ("n2", "")):
        job = cluster.submit(script, flags=(f"--nodelist={node}", f"--output={tmp_path}/%j.txt"))
        cluster.wait(job, "COMPLETED", timeout=20)
        assert cluster.log(job) == seen


def test_environments_of_another_slurm_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "SLURM_JOB_ID" not in environment()
