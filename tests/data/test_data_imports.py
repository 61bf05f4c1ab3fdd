"""What the data package may pull in."""

from __future__ import annotations

import subprocess
import sys


def test_the_pre_flight_side_of_data_needs_no_torch_and_nothing_needs_megatron():
    program = (
        "import sys, nemo_rmt.data.corpora, nemo_rmt.data.sft, nemo_rmt.data.tasks, nemo_rmt.data.tokenizer\n"
        "assert 'torch' not in sys.modules\n"
        "import nemo_rmt.data.batch\n"
        "assert 'megatron' not in sys.modules and 'nemo_run' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
