"""lm-eval, ending with the process that started it: ``python -m nemo_rmt.stages.lm_eval PID ARGUMENT...``."""

from __future__ import annotations

import runpy
import sys

from nemo_rmt.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv.pop(1)))
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
