"""Runs a command that must not outlive the process that asked for it, nor leave processes behind.

    python -m nemo_rmt.rollout.vllm.guard PARENT_PID COMMAND...

The command leads a session of its own. When the parent is gone, however it ended, when this process gets SIGTERM, or
when the command itself ends, the whole session is ended. Prints the command's process id; exits with its status, or
with 128 and the number of the signal that killed it. PR_SET_PDEATHSIG alone would not do: a child's children do not
have it, and it also fires when the one thread ends that started the child. Standard library only, to start at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from nemo_rmt.process import die_with_parent

POLL_S = 0.2
GRACE_S = 10.0
"""Between SIGTERM, on which vLLM frees shared memory, and SIGKILL."""


def guard(parent: int, command: list[str]) -> int:
    """Run the command to its end or the parent's; its exit status."""
    asked = []
    signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
    own = os.getpid()
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(own),
    )
    print(server.pid, flush=True)
    while server.poll() is None and os.getppid() == parent and not asked:
        time.sleep(POLL_S)
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass  # stopped, or in the middle of a long call
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it ended
    status = server.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
