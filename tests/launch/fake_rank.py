"""Stands in for a rank in tests of the launcher: does what ``plan.json`` beside its stage.yaml says for it.

What a rank may do: "exit N", "hang" (beats, without progress), "stop" (waits for a request to stop), "raise TEXT", or
"kill" (of itself). Others end when they lose a peer, as collectives do.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from nemo_rmt import pulse, stopping
from nemo_rmt.exit_codes import STOPPED
from nemo_rmt.process import die_with_parent


def main(stage_yaml: Path) -> int:
    die_with_parent()
    folder, rank = stage_yaml.parent, int(os.environ["RANK"])
    word, _, rest = json.loads((folder / "plan.json").read_text())[rank].partition(" ")
    place = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    (folder / f"place_{rank}.json").write_text(json.dumps({**place, "pid": os.getpid()}))
    life = pulse.start(folder / "log" / "beats", rank, 0.1)
    with stopping.waiting():
        stopping.install()
        print(f"rank {rank} is here", flush=True)
        time.sleep(0.3)
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "raise":
            life.fail(rest)
            return 1
        while word == "hang" or (word == "stop" and not stopping.requested()):
            time.sleep(0.02)
        return STOPPED if word == "stop" else int(rest)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
