"""ReMiT's forward step inside Bridge's own training, against Bridge's loss and the formula on full logits."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import run_ranks

HERE = Path(__file__).parent


@pytest.mark.parametrize("ranks", [1, 2], ids=["tp1", "tp2_sp"])
def test_pretrain_takes_bridges_loss_and_then_the_weighted_one(models, ranks):
    run_ranks(HERE / "pretrain_worker.py", ranks, str(ranks), str(models))


def test_the_gap_is_centred_over_whole_documents_on_context_parallel_ranks(models):
    run_ranks(HERE / "context_worker.py", 2, "2", str(models / "rl"))
