"""Two ranks that wait for rank 0's process, for longer than a collective may take; then for one that fails.

usage: lm_eval_worker.py LOG
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

from nemo_rmt import pulse
from nemo_rmt.config import Parallel
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages.lm_eval.harness import watch


def start(code: str, log: Path) -> subprocess.Popen:
    with open(log, "wb") as output:
        return subprocess.Popen([sys.executable, "-uc", code], stdout=output, stderr=subprocess.STDOUT)


def main(log: Path) -> None:
    with distributed(Parallel(), seed=1, timeout=datetime.timedelta(seconds=5)) as layout:

        def ticks_while(code: str) -> int:
            before = pulse._progress
            watch(start(code, log) if layout.rank == 0 else None, log)
            return pulse._progress - before

        assert ticks_while("import time; time.sleep(7)") == 0
        assert ticks_while("import time\nfor part in range(3): print(part); time.sleep(1.5)") >= 3
        try:
            ticks_while("print('a word'); raise ValueError('no model')")
        except RuntimeError as error:
            assert f"{log} ends with: a word" in str(error) and "ValueError: no model" in str(error), error
        else:
            raise AssertionError("a failure went unnoticed")
    print(f"rank {layout.rank} saw it all", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
