"""Run a script as real processes under torchrun, or alone, with a time limit so that a hang fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def run_ranks(script: Path, processes: int, *arguments: str, timeout: float = 150) -> str:
    """Run ``script`` on that many ranks (gloo, one thread each) and return its output; fail on any non-zero exit."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*launcher, str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{script.name} on {processes} ranks hung for {timeout} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, f"{script.name} on {processes} ranks exited {process.returncode}:\n{output[-6000:]}"
    return output
