"""RMT's settings: what cannot work is refused when the recipe is read, by its key, its value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nemo_rmt.config import RMT, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_io import load_recipe

BASELINES = Path(__file__).parents[1] / "recipes" / "baselines"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rmt.grpo.samples_per_group=1"], ["rmt.grpo.samples_per_group", "2", "1"]),
        (["rmt.budget.minimum=30"], ["rmt.budget", "initial 24 is under minimum 30"]),
        (["rmt.budget.decay=1.0"], ["rmt.budget.decay", "less than 1", "1.0"]),
        (["rmt.budget.decay=0"], ["rmt.budget.decay", "greater than 0"]),
        (["rmt.curriculum.early=[0.5, 0.3, 0.1]"], ["rmt.curriculum", "early must sum to 1", "0.9"]),
        (["rmt.curriculum.late=[0.5, 0.6, -0.1]"], ["rmt.curriculum.late", "-0.1"]),
        (["rmt.curriculum.transition=[0.7, 0.3]"], ["rmt.curriculum", "transition", "ascending", "(0.7, 0.3)"]),
        (["rmt.difficulty.edges=[1.5, 0.5]"], ["rmt.difficulty", "edges", "ascending", "(1.5, 0.5)"]),
        (["rmt.difficulty.quantiles=[0.5, 0.9]"], ["rmt.difficulty", "exactly one of edges and quantiles"]),
        (["rmt.difficulty.edges=null"], ["rmt.difficulty", "exactly one of edges and quantiles"]),
        (["rmt.difficulty.ceiling=1.0"], ["rmt.difficulty", "ceiling 1.0", "edges (0.5, 1.5)"]),
        (["rmt.prompt.instruction=think"], ["rmt", "{budget}", "budget.schedule=none"]),
        (["rmt.budget.schedule=none"], ["rmt", "take {budget} out of it"]),
        (["rmt.budget.schedule=none", "rmt.prompt.instruction=''"], ["rmt", "reward.length_weight=0"]),
        (["rmt.reward.prediction_tokens=3"], ["rmt.reward", "prediction_tokens=1", "match=prefix"]),
        (["rmt.reward.length_weight=1.5"], ["rmt.reward.length_weight", "1.5"]),
        (["rmt.resample_rounds=2", "rmt.grpo.drop_zero_variance=false"], ["rmt", "grpo.drop_zero_variance=true"]),
        (["rmt.sequence_length=50", "rmt.document_length=null"], ["rmt", "no room for a document", "sequence_length"]),
        (["rmt.document_length=500"], ["document of 500 tokens", "model.max_position=512", "rmt.document_length"]),
        (["rmt.corpora=[poems]"], ["rmt.corpora", "poems", "programs", "rmt.corpora=[]"]),
        (["rmt.curiculum.early=[1,0,0]"], ["rmt.curiculum", "rmt.curriculum"]),
    ],
)
def test_what_cannot_work_is_refused_with_key_value_and_remedy(overrides, parts):
    with pytest.raises(UserError) as refused:
        load_recipe("tiny", [], overrides)
    for part in parts:
        assert part in str(refused.value), str(refused.value)


def test_a_stage_that_is_switched_off_is_not_checked_against_the_rest():
    recipe = load_recipe("tiny", [], ["rmt.enabled=false", "rmt.corpora=[poems]", "rmt.document_length=500"])
    assert not recipe.rmt.enabled


def test_the_papers_settings_are_the_defaults():
    rmt = RMT()
    assert (rmt.budget.initial, rmt.budget.minimum, rmt.budget.decay) == (800, 1, 0.2)
    assert rmt.ntp_coefficient == 0.1 and rmt.grpo.samples_per_group == 8
    assert rmt.curriculum.transition == (0.3, 0.7)
    assert rmt.prompt.instruction.strip() == "Please use exactly {budget} tokens within <think></think>"


def test_every_baseline_differs_from_rmt_by_configuration_alone():
    baselines = {path.stem: load_recipe("tiny", [path], []).rmt for path in sorted(BASELINES.glob("*.yaml"))}
    ours = load_recipe("tiny", [], []).rmt
    assert set(baselines) == {"rpt", "no_budget", "no_curriculum", "no_ntp", "ntp"}
    rpt = baselines["rpt"]
    assert rpt.ntp_coefficient == 0 and rpt.budget.schedule == "none" and rpt.reward.length_weight == 0
    assert rpt.curriculum.early == rpt.curriculum.late == (0, 0, 1)
    without = baselines["no_curriculum"].curriculum
    assert without.early == without.late and baselines["no_curriculum"].budget == ours.budget
    assert baselines["no_ntp"].ntp_coefficient == 0 and baselines["no_ntp"].curriculum == ours.curriculum
    assert baselines["no_budget"].budget.schedule == "none" and baselines["no_budget"].ntp_coefficient == 0.1
    assert baselines["ntp"].objective == "ntp"


def test_the_baselines_say_what_they_are():
    for path in BASELINES.glob("*.yaml"):
        assert path.read_text().startswith("# ") and set(yaml.safe_load(path.read_text())) == {"rmt"}


def test_the_longest_document_leaves_room_for_one_response():
    rmt = RMT(sequence_length=4096)
    assert rmt.longest_document + 64 + 2 * 800 + 1 + 1 + 1 == 4096
    assert Recipe().rmt.longest_document == rmt.longest_document
