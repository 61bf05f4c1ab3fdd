"""A Slurm of virtual nodes on this machine: ``python slurm_daemons.py FOLDER NODES``, as root; no systemd, no cgroups.

Starts munged, slurmctld and one slurmd per node, on free ports, with everything they write in FOLDER; prints ``ready``
once every node is idle; and runs until its standard input ends, which it also does when the starter dies, however it
dies, or until SIGTERM. Then it ends every process that came from it and deletes FOLDER. As a child subreaper it stays
the ancestor of all of them: slurmstepd and the jobs leave their parent's session and outlive slurmd, but they cannot
get away from here. Nothing that a Slurm of the system runs is touched.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
START_S = 30.0
"""Seconds until every node must be idle."""
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: seconds before a requeued job may start again (Slurm's default: 120, the least it accepts: 6)
AuthInfo=socket={folder}/munge/socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=1024
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=100000
PriorityType=priority/basic
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# seconds between SIGTERM and SIGKILL (Slurm's default: 30)
KillWait={kill_wait}
MinJobAge=86400
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.{i} Port={port} CPUs=16 RealMemory={memory} Gres=gpu:{gpus}\n"
)
GPUS = 2
"""Per node; only counted: no device files stand behind them."""
KILL_WAIT_S = 10


def configure(folder: Path, nodes: int) -> None:
    """Write slurm.conf, gres.conf and munge's key. Nodes get addresses of their own, and one host name."""
    for name in ("munge", "state", "log", "hidden", *(f"spool.n{i}" for i in range(1, nodes + 1))):
        (folder / name).mkdir()
    (folder / "munge").chmod(0o711)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host, ports = socket.gethostname().split(".")[0], free_ports(nodes + 1)
    text = CONFIGURATION.format(host=host, port=ports[0], folder=folder, nodes=nodes, kill_wait=KILL_WAIT_S)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    for i in range(1, nodes + 1):
        text += NODE.format(i=i, host=host, port=ports[i], memory=memory, gpus=GPUS)
    (folder / "slurm.conf").write_text(text)
    for i in range(GPUS):  # Slurm counts a GPU only with a file
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(folder: Path, nodes: int) -> None:
    """Start the daemons and wait until every node is idle."""
    configure(folder, nodes)
    munge, conf = folder / "munge", folder / "slurm.conf"
    os.environ["SLURM_CONF"] = str(conf)
    files = [f"--{name}-file={munge}/{name}" for name in ("key", "log", "pid", "seed")]
    daemon(folder, "munged", ["munged", "--foreground", "--force", f"--socket={munge}/socket", *files])
    await_until(lambda: (munge / "socket").exists(), folder)
    daemon(folder, "slurmctld", ["slurmctld", "-D", "-c", "-f", str(conf)])
    for i in range(1, nodes + 1):
        command = ["slurmd", "-D", "-N", f"n{i}", "-f", str(conf)]
        if i == 2:  # a mount namespace of its own, in which FOLDER/hidden is another folder than everywhere else
            mount = f"mount -t tmpfs hidden {folder}/hidden && exec {' '.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", mount]
        daemon(folder, f"slurmd.n{i}", command)
    await_until(lambda: idle_nodes() == nodes, folder)


def daemon(folder: Path, name: str, command: list[str]) -> None:
    """Start one daemon, which Linux kills if this process is killed."""
    parent = os.getpid()
    with open(folder / "log" / f"{name}.out", "wb") as output:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=lambda: tie(parent)
        )


def tie(parent: int) -> None:
    """Ask for SIGKILL at the parent's death."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def idle_nodes() -> int:
    """Nodes ready for jobs."""
    asked = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, timeout=20)
    return len(set(asked.stdout.split()))


def await_until(condition, folder: Path) -> None:
    """Poll until the condition holds. Raises RuntimeError with the daemons' last words after START_S seconds."""
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            words = [f"{log.name}: {log.read_text()[-1500:]}" for log in sorted((folder / "log").iterdir())]
            raise RuntimeError("Slurm did not start:\n" + "\n".join(words))
        time.sleep(0.05)


def end_everything() -> None:
    """Kill this process's children until it has none: those of a dead one become this process's own."""
    while True:
        for child in children():
            os.kill(child, signal.SIGKILL)  # nobody else waits for it, so that its number is still its own
        try:
            os.wait()
        except ChildProcessError:
            return


def children() -> list[int]:
    """Pids of this process's children, the dead ones not waited for included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        if int(after_name[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def main(folder: Path, nodes: int) -> int:
    """Start, report, wait for the end of standard input, end everything."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        start(folder, nodes)
        print("ready", flush=True)
        sys.stdin.buffer.read()
    except RuntimeError as error:
        print(error, flush=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_everything()
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
