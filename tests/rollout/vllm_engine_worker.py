"""Two ranks around scripted vLLM backends.

usage: vllm_engine_worker.py "2 replicas" | "1 of 2 ranks" | "tensor parallel"
"""

from __future__ import annotations

import random
import sys

import pytest
from scripted_vllm import VOCAB, Scripted, expected, two_tensors

from nemo_rmt.config import Parallel
from nemo_rmt.megatron.runtime import Layout, distributed
from nemo_rmt.rollout.engine import EngineLost, Sampling
from nemo_rmt.rollout.vllm.engine import Replicas, VLLMEngine

SAMPLING = Sampling(9, frozenset({0}), seed=3, marker=4, after_marker=2)
REPLICAS = {
    # replicas of which each rank asks one; data-parallel ranks
    "2 replicas": lambda rank: Replicas([0, 1], rank),
    "1 of 2 ranks": lambda rank: Replicas([0], 0 if rank == 0 else None),
    # a replica over both ranks, which hold one model together
    "tensor parallel": lambda rank: Replicas([0], 0),
}


def main(ranks: str, layout: Layout) -> None:
    replicas = REPLICAS[ranks](layout.rank)
    rng = random.Random(layout.data_rank)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 6))] for _ in range(20 + 9 * layout.data_rank)]
    ids = [100 * layout.data_rank + index for index in range(len(prompts))]
    right = [expected(prompt, SAMPLING, version=7) for prompt in prompts]
    total = 20 if layout.data_size == 1 else 49

    def engine(backend: Scripted) -> VLLMEngine:
        own = None if replicas.own is None else backend
        return VLLMEngine(own, replicas, layout, weights=two_tensors, version=lambda: 7, max_position=64)

    backend = Scripted()
    assert engine(backend).generate(prompts, ids, SAMPLING) == right
    if replicas.own is None:
        assert backend.calls == []
    else:
        share = len(backend.asked[0])
        assert share in {total // len(replicas.leaders), -(-total // len(replicas.leaders))}

    for last in {0, layout.world_size - 1}:  # a loss on either rank concerns both
        if REPLICAS[ranks](last).own is None:
            continue
        lost_in = ["complete", "load"] if layout.rank == last else []
        mended = engine(Scripted(list(lost_in), restarts=2))
        assert mended.generate(prompts, ids, SAMPLING) == right
        assert mended.metrics["rollout/restarts"] == 2
        dead = engine(Scripted(lost_in[:1]))
        with pytest.raises(EngineLost, match="restarted too often"):
            dead.generate(prompts, ids, SAMPLING)
    print("done", flush=True)


if __name__ == "__main__":
    with distributed(Parallel(tensor=2 if sys.argv[1] == "tensor parallel" else 1), seed=5) as place:
        main(sys.argv[1], place)
