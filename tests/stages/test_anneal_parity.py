"""The anneal with each objective, at every parallelism: the steps of one rank. Real processes, fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_recipe import small_recipe
from torchrun import run_ranks

WORKER = Path(__file__).with_name("anneal_worker.py")
LAYOUTS = {
    "one_rank": (1, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "large_micro_batches": (1, {}),
}
TIMED = ("time", "train/step_s", "train/tokens_per_s", "train/model_tflops_per_s")


def anneals(folder: Path, layout: str, data_folder: Path, **anneal: object) -> dict[str, list[dict]]:
    """Steps by objective, and the shown rows."""
    processes, parallel = LAYOUTS[layout]
    cluster = {"gpus_per_node": processes}
    recipe = small_recipe("unused", parallel=parallel, cluster=cluster, anneal={"steps": 3, **anneal})
    run_ranks(WORKER, processes, str(folder), recipe.model_dump_json(), str(data_folder), layout)
    return json.loads((folder / f"{layout}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("anneals")


@pytest.fixture(scope="module")
def one_rank(folder, data_folder) -> dict[str, list[dict]]:
    return anneals(folder, "one_rank", data_folder)


def test_each_objective_trains_another_model(one_rank):
    lasts = {name: steps[-1]["train/loss"] for name, steps in one_rank.items() if "/" not in name}
    assert len(set(lasts.values())) == 4, lasts
    assert len({steps[0]["train/loss"] for name, steps in one_rank.items() if "/" not in name}) == 1


def test_each_objective_reports_what_it_does(one_rank):
    for step in one_rank["rho1"]:
        assert step["rho1/selected"] == pytest.approx(0.6, abs=0.01)
        assert step["rho1/selected_loss"] != pytest.approx(step["train/loss"], abs=1e-3)
    for step in one_rank["distill"]:
        assert step["distill/divergence"] > 0
        expected = 0.7 * step["distill/divergence"] + 0.3 * step["train/loss"]
        assert step["distill/loss"] == pytest.approx(expected, rel=1e-5)
    remit = one_rank["remit"][0]
    assert 0 < remit["remit/agreement"] <= 1 and remit["remit/gap_abs"] > 0
    assert sum(remit[f"remit/gap_hist_{bin:02d}"] for bin in range(20)) == pytest.approx(1)


def test_rows_of_text_are_shown_with_their_weights_before_the_first_and_the_last_step(one_rank):
    for objective, bounds in (("remit", (0.8, 1.2)), ("rho1", (0, 1))):
        shown = one_rank[f"{objective}/weights.jsonl"]
        assert {row["step"] for row in shown} == {1, 3}
        for row in shown:
            assert len(row["tokens"]) == len(row["weights"]) == len(row["gaps"]) == 64 and row["documents"]
            weights = [weight for weight in row["weights"] if weight is not None]
            assert all(bounds[0] <= weight <= bounds[1] for weight in weights) and len(set(weights)) > 1
            assert [gap is None for gap in row["gaps"]] == [weight is None for weight in row["weights"]]
    assert not {"uniform/weights.jsonl", "distill/weights.jsonl"} & set(one_rank)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2"])
def test_steps_equal_those_of_one_rank(layout, one_rank, folder, data_folder):
    found = anneals(folder, layout, data_folder)
    assert found.keys() == one_rank.keys()
    for name, steps in one_rank.items():
        for step, other in zip(steps, found[name], strict=True):
            if name.endswith("weights.jsonl"):
                assert other["tokens"] == step["tokens"] and other["documents"] == step["documents"]
                continue
            untimed = {key: value for key, value in step.items() if key not in TIMED}
            assert {key: other[key] for key in untimed} == pytest.approx(untimed, rel=2e-4, abs=2e-4), name


def test_rho1_selects_the_same_tokens_whatever_the_micro_batch(one_rank, folder, data_folder):
    found = anneals(folder, "large_micro_batches", data_folder, micro_batch_size=8)
    for step, other in zip(one_rank["rho1"], found["rho1"], strict=True):
        assert other["rho1/selected_loss"] == pytest.approx(step["rho1/selected_loss"], rel=1e-4)
