"""Packed rows train as one sequence per row does, at every layout: real processes, the stages' own packing, fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_recipe import small_recipe
from torchrun import run_ranks

WORKER = Path(__file__).with_name("packed_worker.py")
LAYOUTS = {
    "one_rank": (1, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {"distributed_optimizer": False}),  # with it a rank has only its share of the gradients
}


def steps(out: Path, layout: str, data_folder: Path) -> list[dict[str, float]]:
    """The metrics of packed steps, which the worker has compared with padded ones."""
    processes, parallel = LAYOUTS[layout]
    recipe = small_recipe(
        "unused",
        parallel=parallel,
        cluster={"gpus_per_node": processes},
        rl={"grpo": {"samples_per_group": 4, "kl_coefficient": 0.1}},
    )
    run_ranks(WORKER, processes, str(out / f"{layout}.json"), recipe.model_dump_json(), str(data_folder))
    return json.loads((out / f"{layout}.json").read_text())


@pytest.fixture(scope="module")
def one_rank(data_folder, tmp_path_factory) -> list[dict[str, float]]:
    return steps(tmp_path_factory.mktemp("one_rank"), "one_rank", data_folder)


def test_objectives_and_groups_without_variance_make_a_difference(one_rank):
    assert len({step["loss"] for step in one_rank}) == len(one_rank)
    for step in one_rank[1:]:
        assert step["kl"] > 0.01 and abs(step["ratio_mean"] - 1) > 0.01 and step["clip_share"] > 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one_rank"])
def test_packed_steps_equal_padded_ones(layout, one_rank, data_folder, tmp_path):
    found = steps(tmp_path, layout, data_folder)
    assert [set(step) for step in found] == [set(step) for step in one_rank]
    if "pipeline" not in LAYOUTS[layout][1]:  # whose stages begin with other weights
        for step, expected in zip(found, one_rank, strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
