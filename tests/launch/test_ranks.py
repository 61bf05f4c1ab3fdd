"""What a rank is started with."""

from __future__ import annotations

from nemo_rmt.launch import ranks
from nemo_rmt.recipe_io import load_recipe


def test_workers_get_their_share_of_the_cores_and_no_compiler_without_a_gpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    two = load_recipe("tiny", [], ["cluster.gpus_per_node=2", "parallel.tensor=2"])
    assert ranks.worker_environment(two)["OMP_NUM_THREADS"] == "3"
    assert ranks.worker_environment(two)["TORCH_COMPILE_DISABLE"] == "1"
    two.cluster.threads = 1
    assert ranks.worker_environment(two)["OMP_NUM_THREADS"] == "1"
