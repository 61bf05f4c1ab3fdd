"""What a chain cost, against sums done by hand, and arms that are to cost as much as another."""

from __future__ import annotations

import json

import pytest
from fake_experiment import BASE, start, write_experiment, write_measured

from nemo_rmt.chain import StageRef
from nemo_rmt.config import Model
from nemo_rmt.experiment import run
from nemo_rmt.experiment.compute import Cost, chain_cost, equal_flops_steps, rl_forwards, rmt_forwards, stage_cost
from nemo_rmt.experiment.shared import SharedStage, shared_chain
from nemo_rmt.model_flops import forward_flops
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.status import recipe_of_run

DATA = {"tokenizer/vocab_size": 500, "data/programs/train_tokens": 4000}
WORDS = ["data.corpora=[{name: programs, kind: chains}]", "rmt.corpora=[]"]


def recipe_with(*words: str):
    return load_recipe("tiny", [], [*WORDS, *words])


def leave(folder, tokens: int = 0, steps: list[dict] = (), metrics: dict | None = None) -> None:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"status": "done", "tokens": tokens, "metrics": metrics or {}}))
    lines = [json.dumps({"step": number, **step}) for number, step in enumerate(steps, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def cost(tmp_path, recipe, ref: StageRef, tokens: int, steps: list[dict] = ()) -> Cost:
    """Of one stage of a recipe's chain that left this."""
    chain = shared_chain(recipe)
    stage = chain[ref]
    leave(tmp_path / stage.inputs["data"].name, metrics=DATA)
    leave(tmp_path / stage.name, tokens, steps)
    return stage_cost(stage, lambda each: tmp_path / each.name)


def forward(model: Model, context: int) -> float:
    return sum(forward_flops(model, 500, context))


def test_pre_training_and_sft_cost_three_forwards_a_token(tmp_path):
    recipe = recipe_with("sft.sequence_length=64")
    assert cost(tmp_path, recipe, StageRef(0, "pretrain"), 1000) == Cost(1000, 3000 * forward(recipe.model, 128))
    (tmp_path / "again").mkdir()
    assert cost(tmp_path / "again", recipe, StageRef(0, "sft"), 200) == Cost(200, 600 * forward(recipe.model, 64))


@pytest.mark.parametrize(
    ("words", "iteration", "forwards"),
    [
        ([], 0, 3),  # uniform: there is no RL model yet
        ([], 1, 4),
        (["anneal.remit.gap_model=frozen"], 1, 5),
        (["anneal.objective=rho1"], 1, 4),
        (["anneal.objective=distill", "anneal.distill.reference=previous_sft"], 1, 4),
        (["anneal.objective=uniform", "anneal.remit.gap_model=frozen"], 1, 3),
    ],
)
def test_an_anneal_costs_a_forward_more_for_every_frozen_model(tmp_path, words, iteration, forwards):
    recipe = recipe_with(*words)
    found = cost(tmp_path, recipe, StageRef(iteration, "anneal"), 1000)
    assert found == Cost(1000, forwards * 1000 * forward(recipe.model, 128))


def test_rl_costs_its_sampling_and_training_on_the_groups_with_a_signal():
    # 2 groups of 4: prompts of 10 tokens, responses of 5; then of 20 and 6
    recipe = recipe_with("rl.global_batch_size=8", "rl.micro_batch_size=8", "rl.grpo.samples_per_group=4")
    steps = [
        {"train/tokens": 8 * 15, "rl/response_length": 5.0, "rl/zero_variance_groups": 0.5},
        {"train/tokens": 8 * 15 + 8 * 26, "rl/response_length": 6.0, "rl/zero_variance_groups": 0.0},
    ]
    sampled = (8 * 5 + 2 * 10) + (8 * 6 + 2 * 20)
    packed = (8 * 5 + 2 * 10) * 0.5 + (8 * 6 + 2 * 20)
    assert rl_forwards(recipe, steps) == sampled + 3 * packed
    recipe.rl.pack, recipe.rl.grpo.drop_zero_variance = False, False
    assert rl_forwards(recipe, steps) == sampled + 3 * (8 * 15 + 8 * 26)
    recipe.rl.grpo.updates_per_rollout, recipe.rl.grpo.kl_coefficient = 2, 0.1
    assert rl_forwards(recipe, steps) == sampled + (2 * 3 + 2) * (8 * 15 + 8 * 26)


def test_rmt_costs_training_sampling_and_the_scores_that_tell_how_hard_tokens_are():
    recipe = recipe_with("rmt.difficulty.max_tokens=null")
    steps = [{"rmt/rollout_tokens": 300.0}, {"rmt/rollout_tokens": 100.0}]
    assert rmt_forwards(recipe, 700, steps, DATA) == 3 * 700 + 400 + 4000
    recipe.rmt.difficulty.max_tokens = 900
    assert rmt_forwards(recipe, 700, steps, DATA) == 3 * 700 + 400 + 900
    recipe.rmt.objective = "ntp"
    assert rmt_forwards(recipe, 700, [{}, {}], DATA) == 3 * 700 + 900


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """An experiment's measurements by arm: two of its arms are to cost what remit does, and its folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr(run.Results, "write", write_measured)
    folder = tmp_path_factory.mktemp("equal")
    arms = {
        **BASE["arms"],
        "more": {"about": "", "settings": {"anneal": {"objective": "uniform"}}, "equal_flops": "remit"},
        "enough": {"about": "", "settings": {"anneal": {"steps": 3000}}, "equal_flops": "remit"},
    }
    path = write_experiment(folder / "equal.yaml", arms=arms, seeds=[1])
    assert start(path, folder / "out", jobs=2) == 0
    patch.undo()
    measured = json.loads((folder / "out" / "equal" / "measured.json").read_text())
    return {each["arm"]: each for each in measured}, folder / "out"


def test_the_rl_behind_the_reference_is_part_of_what_remit_costs_and_not_of_what_uniform_does(compared):
    found, out = compared
    chain = shared_chain(recipe_of_run(out / "equal" / "remit" / "seed_1"))

    def place(stage: SharedStage):
        return out / "stages" / stage.name

    counted = [
        ref for ref in chain if ref not in [StageRef(0, "data"), StageRef(0, "evaluate"), StageRef(1, "evaluate")]
    ]
    assert found["remit"]["flops"] == pytest.approx(sum(stage_cost(chain[ref], place).flops for ref in counted))
    assert found["remit"]["flops"] == chain_cost(chain, place).flops
    assert found["remit"]["tokens"] > found["uniform"]["tokens"]
    assert StageRef(0, "rl") in counted


def test_an_arm_gets_the_steps_that_make_it_cost_as_much_and_one_less_would_not_do(compared):
    found, out = compared
    recipe = recipe_of_run(out / "equal" / "more" / "seed_1")
    assert recipe.anneal.steps > recipe_of_run(out / "equal" / "uniform" / "seed_1").anneal.steps
    step = 3 * 8 * 128 * sum(forward_flops(recipe.model, 512, 128))
    assert 0 <= found["more"]["flops"] - found["remit"]["flops"] < step
    last = out / "equal" / "more" / "seed_1" / "iteration_001" / "anneal"
    assert len((last / "metrics.jsonl").read_text().splitlines()) == recipe.anneal.steps
    earlier = out / "equal" / "more" / "seed_1" / "iteration_000" / "anneal"
    assert len((earlier / "metrics.jsonl").read_text().splitlines()) == 300  # the last iteration's alone
    control = recipe_of_run(out / "equal" / "uniform" / "seed_1").anneal
    on_the_way = [-(-anneal.steps // anneal.checkpoint_interval) for anneal in (recipe.anneal, control)]
    assert on_the_way[0] == on_the_way[1] > 1  # checkpoints, to be measured along it
    other = out / "equal" / "uniform" / "seed_1" / "iteration_000" / "anneal"
    assert earlier.resolve() == other.resolve()


def test_an_arm_that_costs_more_anyway_keeps_its_steps(compared):
    _, out = compared
    assert recipe_of_run(out / "equal" / "enough" / "seed_1").anneal.steps == 3000


def test_the_steps_of_an_arm_that_has_what_the_other_lacks_count_what_is_there_before_alone(compared):
    _, out = compared
    chains = {name: shared_chain(recipe_of_run(out / "equal" / name / "seed_1")) for name in ("remit", "uniform")}
    recipe = recipe_of_run(out / "equal" / "uniform" / "seed_1")
    steps = equal_flops_steps(recipe, chains["uniform"], chains["remit"], lambda each: out / "stages" / each.name)
    assert steps == recipe_of_run(out / "equal" / "more" / "seed_1").anneal.steps


def test_next_token_prediction_in_the_place_of_rmt_gets_the_steps_itself(tmp_path):
    words = ["iterations=1", "sft.enabled=false", "rl.enabled=false", "rmt.steps=2"]
    recipe, other = recipe_with(*words, "rmt.objective=ntp"), recipe_with(*words)
    chain, theirs = shared_chain(recipe), shared_chain(other)
    left = {"data": 0, "pretrain": 1000, "anneal": 500, "rmt": 700}
    for ref, stage in theirs.items():
        if ref.stage in left:
            step = {"rmt/rollout_tokens": 300.0, "rmt/document_tokens": 100.0}
            leave(tmp_path / stage.name, left[ref.stage], [step, step], DATA)
    steps = equal_flops_steps(recipe, chain, theirs, lambda each: tmp_path / each.name)
    assert steps == (3 * 700 + 2 * 300) / (3 * 100)
    longer = shared_chain(recipe, steps)
    assert [ref.stage for ref in chain if longer[ref].name != chain[ref].name] == ["rmt", "evaluate"]
    assert longer[StageRef(0, "rmt")].recipe.rmt.steps == steps
