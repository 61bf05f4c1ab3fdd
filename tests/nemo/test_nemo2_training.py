"""A small NeMo recipe trains across the switch to ReMiT, through NeMo's own trainer, in several layouts on gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torchrun import run_ranks

pytest.importorskip("nemo.collections.llm")

from nemo2_model import PEAK, STABLE, STEPS, WARMUP

WORKER = Path(__file__).with_name("nemo2_worker.py")
LAYOUTS = ["one", "tp2", "dp2", "pp2", "vpp2"]
ANNEALING = range(STABLE, STEPS)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> dict[str, list[dict]]:
    """Per layout, what each rank wrote. Two ranks go through all layouts of two: NeMo's import takes longest."""
    alone, pair = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("pair")
    run_ranks(WORKER, 1, str(alone), "one", timeout=300)
    run_ranks(WORKER, 2, str(pair), *LAYOUTS[1:], timeout=400)
    facts = {"one": [json.loads((alone / "rank_0.json").read_text())["one"]]}
    both = [json.loads((pair / f"rank_{rank}.json").read_text()) for rank in range(2)]
    return facts | {name: [rank[name] for rank in both] for name in [*LAYOUTS[1:], "context_parallel"]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_before_the_switch_the_loss_is_nemos(ranks, layout):
    for facts in ranks[layout]:
        assert facts["remit"]["loss"][:STABLE] == pytest.approx(facts["plain"]["loss"][:STABLE], abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_one_are_nemos_training_to_the_end(ranks, layout):
    for facts in ranks[layout]:
        assert facts["uniform"]["loss"] == pytest.approx(facts["plain"]["loss"], abs=1e-6)
        assert facts["uniform"]["weights"] == pytest.approx(facts["plain"]["weights"], abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_the_switch_loss_and_gradient_are_those_computed_from_the_logits(ranks, layout):
    last_stages = [facts["remit"] for facts in ranks[layout] if facts["remit"]["expected"]]
    assert len(last_stages) == (2 if layout in ("tp2", "dp2") else 1)
    for remit in last_stages:
        assert list(remit["expected"]) == [str(step) for step in ANNEALING]
        assert remit["loss"][STABLE:] == pytest.approx(list(remit["expected"].values()), abs=1e-6)
        assert max(remit["gradient_error"].values()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_make_a_difference_and_reach_the_logs_of_every_stage(ranks, layout):
    for facts in ranks[layout]:
        remit, plain = facts["remit"], facts["plain"]
        assert all(abs(a - b) > 1e-4 for a, b in zip(remit["loss"][STABLE:], plain["loss"][STABLE:], strict=True))
        assert remit["metrics"][:STABLE] == [{}] * STABLE
        for metrics in remit["metrics"][STABLE:]:
            assert 0.01 < metrics["remit/weight_std"] < 0.05
            assert abs(metrics["remit/weight_mean"] - 1) < 0.05
            assert 0 < metrics["remit/share_low"] < 1 and 0 < metrics["remit/share_high"] < 1
        # the same weights and tokens as before the first weighted update
        assert remit["metrics"][STABLE]["remit/nll"] == pytest.approx(plain["loss"][STABLE], abs=1e-6)


def test_the_reference_is_the_model_of_its_checkpoint(ranks):
    facts = ranks["one"][0]
    for step, logprobs in facts["remit"]["reference_logprobs"].items():
        rows = facts["plain"]["logprobs"][int(step) * 4 : int(step) * 4 + 4]
        assert sum(logprobs, []) == pytest.approx(sum(rows, []), abs=1e-5)


def test_in_bfloat16_the_reference_is_loaded_and_the_weights_are_the_same_but_for_rounding(ranks):
    half, full = ranks["one"][0]["bf16"], ranks["one"][0]["remit"]
    assert half["loss"][STABLE:] == pytest.approx(list(half["expected"].values()), abs=1e-6)
    for step, logprobs in half["reference_logprobs"].items():
        assert sum(logprobs, []) == pytest.approx(sum(full["reference_logprobs"][step], []), abs=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_in_no_checkpoint_optimizer_or_gradient_buffer(ranks, layout):
    for facts in ranks[layout]:
        assert facts["new_tensors"] == []
        assert facts["remit"]["reference_trains"] is False
        for count in ("parameters", "optimizer_parameters", "buffers"):
            assert facts["remit"][count] == facts["plain"][count]


def test_a_checkpoint_can_be_read_without_this_package(ranks):
    assert "Qwen3Model" in ranks["one"][0]["context"]
    assert "nemo_rmt" not in ranks["one"][0]["context"]


def learning_rate(step: int, peak: float, warmup: int, stable: int, steps: int) -> float:
    ramp, decay = (step + 1) / (warmup + 1), (steps - step) / (steps - stable)
    return peak * min(ramp, 1.0, decay)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_learning_rate_is_constant_until_the_switch_then_falls_to_zero(ranks, layout):
    expected = [learning_rate(step, PEAK, WARMUP, STABLE, STEPS) for step in range(STEPS)]
    for facts in ranks[layout]:
        assert facts["remit"]["lr"] == pytest.approx(expected)


def test_resuming_in_the_middle_of_annealing_continues_it_exactly(ranks):
    whole, resumed = ranks["one"][0]["remit"], ranks["one"][0]["resumed"]
    assert resumed["loss"] == pytest.approx(whole["loss"][4:], abs=1e-6)
    assert resumed["lr"] == pytest.approx(whole["lr"][4:])
    assert resumed["weights"] == pytest.approx(whole["weights"], abs=1e-6)


def test_a_resumed_run_follows_the_recipe_and_not_the_schedule_of_its_checkpoint(ranks):
    resumed = ranks["one"][0]["rescheduled"]
    assert resumed["lr"] == pytest.approx([learning_rate(step, 2 * PEAK, WARMUP, 2, STEPS) for step in (4, 5)])


@pytest.mark.parametrize(
    "changed, message",
    [
        ("ffn_hidden_size", "mlp.linear_fc2.weight is [4, 32, 48], not [4, 32, 64]"),
        ("num_layers", "linear_proj.weight is [4, 32, 32], not [3, 32, 32]"),
        ("vocab_size", "module.output_layer.weight is [96, 32], not [128, 32]"),
    ],
)
def test_a_reference_of_another_architecture_is_refused_before_the_first_step(ranks, changed, message):
    refused = ranks["one"][0][f"other {changed}"]
    assert refused["error"].startswith("remit.reference=") and message in refused["error"]
    assert refused["lr"] == []


@pytest.mark.parametrize("segments", ["rows", "documents"])
def test_the_gap_is_centred_over_all_context_parallel_ranks(ranks, segments):
    for facts in (rank[segments] for rank in ranks["context_parallel"]):
        assert facts["loss"] == pytest.approx(facts["whole_loss"], rel=1e-6)
        assert facts["tokens"] == facts["whole_tokens"]
        assert facts["gradient_error"] < 1e-6
        assert facts["error_without_group"] > 1e-3
