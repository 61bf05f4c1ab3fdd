"""The log-probability head against log_softmax of full logits, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import run_ranks

WORKER = Path(__file__).with_name("head_worker.py")


@pytest.mark.parametrize("arguments", [("1",), ("2",), ("2", "sequence_parallel")], ids=["tp1", "tp2", "tp2_sp"])
def test_scores_and_gradients_equal_full_logits(arguments):
    run_ranks(WORKER, int(arguments[0]), *arguments)
