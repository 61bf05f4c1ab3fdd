"""Which stages a recipe asks for, and what each one reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rmt.chain import StageRef, plan_chain
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_io import load_recipe


def test_iteration_0_pretrains_and_anneals_uniformly_and_later_ones_are_guided_by_the_rl_model_before():
    chain = {str(planned.ref): planned for planned in plan_chain(load_recipe("tiny", [], ["iterations=3"]))}
    later = ["anneal", "rmt", "sft", "rl", "evaluate"]
    assert [name.split()[-1] for name in chain] == ["data", "pretrain", *later, *later, *later]
    assert "reference" not in chain["iteration 0 anneal"].inputs
    assert chain["iteration 2 anneal"].inputs == {
        "data": StageRef(0, "data"),
        "checkpoint": StageRef(0, "pretrain"),
        "reference": StageRef(1, "rl"),
    }
    assert list(chain["iteration 0 evaluate"].inputs) == ["data", "pretrain", "anneal", "rmt", "sft", "rl"]
    assert list(chain["iteration 1 evaluate"].inputs) == ["data", "anneal", "rmt", "sft", "rl"]


def test_a_given_checkpoint_replaces_pretraining_and_a_given_reference_guides_iteration_0():
    overrides = ["pretrain.checkpoint=/c", "anneal.remit.reference=/r", "iterations=1"]
    data, anneal, *_, evaluate = plan_chain(load_recipe("tiny", [], overrides))
    assert (data.ref.stage, anneal.ref.stage) == ("data", "anneal")
    assert (anneal.inputs["checkpoint"], anneal.inputs["reference"]) == (Path("/c"), Path("/r"))
    assert "pretrain" not in evaluate.inputs


def test_a_cache_of_the_references_numbers_guides_every_iteration_and_no_reference_is_read():
    chain = plan_chain(load_recipe("tiny", [], ["anneal.remit.reference.cache=/cache"]))
    anneals = [planned for planned in chain if planned.ref.stage == "anneal"]
    assert [planned.ref.iteration for planned in anneals] == [0, 1]
    for planned in anneals:
        assert planned.note == "remit (cached)"
        assert planned.inputs["cache"] == Path("/cache") and "reference" not in planned.inputs


@pytest.mark.parametrize("objective", ["remit", "rho1", "distill"])
def test_the_sft_model_may_guide_every_objective_from_iteration_1_on(objective):
    words = [f"anneal.objective={objective}", f"anneal.{objective}.reference=previous_sft", "rl.enabled=false"]
    first, second = (each for each in plan_chain(load_recipe("tiny", [], words)) if each.ref.stage == "anneal")
    assert first.note == "uniform: no SFT model yet" and "reference" not in first.inputs
    assert second.note == f"{objective} (SFT model)" and second.inputs["reference"] == StageRef(0, "sft")


def test_start_from_previous_continues_the_last_base():
    chain = plan_chain(load_recipe("tiny", [], ["flywheel.start_from=previous", "anneal.objective=uniform"]))
    anneal = next(planned for planned in chain if planned.ref == StageRef(1, "anneal"))
    assert anneal.inputs == {"data": StageRef(0, "data"), "checkpoint": StageRef(0, "rmt")}


def test_stages_that_are_not_enabled_are_left_out_and_the_next_starts_from_what_the_last_one_made():
    overrides = ["anneal.enabled=false", "sft.enabled=false", "pretrain.checkpoint=/c", "iterations=1"]
    data, rmt, rl, evaluate = plan_chain(load_recipe("tiny", [], overrides))
    assert rmt.inputs == {"data": data.ref, "checkpoint": Path("/c")}
    assert rl.inputs == {"data": data.ref, "checkpoint": rmt.ref}
    # without an anneal the base itself is measured, to compare with
    assert evaluate.inputs == {"data": data.ref, "pretrain": Path("/c"), "rmt": rmt.ref, "rl": rl.ref}


def test_the_last_iteration_may_end_with_a_base_which_is_then_its_final_model():
    chain = plan_chain(load_recipe("tiny", [], ["iterations=3", "flywheel.ends_with=anneal"]))
    made = {k: [str(each.ref.stage) for each in chain if each.ref.iteration == k] for k in range(3)}
    assert made[1] == ["anneal", "rmt", "sft", "rl", "evaluate"] and made[2] == ["anneal", "evaluate"]
    assert chain[-2].inputs["reference"] == StageRef(1, "rl")
    assert list(chain[-1].inputs) == ["data", "anneal"]


def test_without_rmt_the_next_iteration_continues_from_the_anneal():
    overrides = ["rmt.enabled=false", "flywheel.start_from=previous"]
    chain = {str(planned.ref): planned for planned in plan_chain(load_recipe("tiny", [], overrides))}
    assert chain["iteration 0 sft"].inputs["checkpoint"] == StageRef(0, "anneal")
    assert chain["iteration 1 anneal"].inputs["checkpoint"] == StageRef(0, "anneal")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{stage}.enabled=false" for stage in ("anneal", "rmt", "sft", "rl")], "all disabled"),
        (["rl.enabled=false"], "anneal.remit.reference=previous"),
        (["anneal.objective=rho1", "rl.enabled=false"], "anneal.rho1.reference=previous takes the RL model"),
        (["anneal.remit.reference=previous_sft", "sft.enabled=false"], "takes the SFT model .* sft.enabled=false"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe("tiny", [], overrides)
