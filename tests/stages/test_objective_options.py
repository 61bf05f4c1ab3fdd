"""Options of the anneal and RL stages that change the objective, on the real stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rmt.config import Recipe
from nemo_rmt.data.tasks import ChainTask
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages import anneal, pretrain, rl, sft
from nemo_rmt.stages import session as session_module
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session
from nemo_rmt.tracking import read_metrics

STAGES = {"pretrain": pretrain, "anneal": anneal, "sft": sft, "rl": rl}


class DigitsTask(ChainTask):
    """Chains scored by the share of digits, so that an untrained model's groups have a gradient."""

    def score(self, problem, response: str) -> float:
        return sum(character.isdigit() for character in response) / max(1, len(response))


@pytest.fixture(scope="module")
def run(recipe, data_folder, tmp_path_factory):
    """A function that runs a stage and returns its steps, in one process group; and two checkpoints to start from."""
    folder = tmp_path_factory.mktemp("options")
    with distributed(recipe.parallel, recipe.seed) as layout:

        def run(stage: str, name: str, recipe: Recipe, **inputs: str) -> list[dict]:
            target = folder / name / stage
            target.mkdir(parents=True)
            given = {"data": str(data_folder)} | {role: str(folder / path) for role, path in inputs.items()}
            job = StageJob(stage=stage, iteration=1, inputs=given, recipe=recipe)
            STAGES[stage].run(Session(job, target, layout))
            return read_metrics(target / "metrics.jsonl")

        run("pretrain", "base", recipe)
        run("sft", "base", recipe, checkpoint=BASE)
        yield run


BASE, TUNED = "base/pretrain/checkpoints/step_00000005", "base/sft/checkpoints/step_00000005"


def test_a_frozen_gap_starts_as_the_current_one_and_then_keeps_its_own(run, recipe):
    steps = {}
    for gap_model in ("current", "frozen"):
        changed = recipe.model_copy(deep=True)
        changed.anneal.remit.gap_model = gap_model
        steps[gap_model] = run("anneal", gap_model, changed, checkpoint=BASE, reference=TUNED)
    current, frozen = steps["current"], steps["frozen"]
    assert frozen[0]["remit/weight_std"] == pytest.approx(current[0]["remit/weight_std"], rel=1e-5)
    assert frozen[-1]["remit/weight_std"] != pytest.approx(current[-1]["remit/weight_std"], rel=1e-3)
    # the current model moves towards the corpus; the gap to the frozen start does not shrink with it
    assert frozen[-1]["remit/gap_mean"] > current[-1]["remit/gap_mean"]


def test_the_model_itself_as_reference_weighs_every_token_1(run, recipe):
    first = run("anneal", "itself", recipe, checkpoint=BASE, reference=BASE)[0]
    assert first["remit/weight_mean"] == 1 and first["remit/weight_std"] == 0 and first["remit/gap_mean"] == 0
    assert first["train/weighted_loss"] == first["train/loss"]


def test_remit_without_a_reference_is_refused(run, recipe):
    with pytest.raises(UserError, match="inputs.reference is missing"):
        run("anneal", "unguided", recipe, checkpoint=BASE)


def test_later_updates_on_the_same_rollouts_are_off_policy(run, recipe, monkeypatch):
    monkeypatch.setattr(session_module, "make_task", DigitsTask)
    steps = {}
    for updates in (1, 3):
        changed = recipe.model_copy(deep=True)
        changed.rl.grpo.updates_per_rollout = updates
        steps[updates] = run("rl", f"updates_{updates}", changed, checkpoint=BASE)
    assert all(step["train/ratio_mean"] == 1 for step in steps[1])
    assert any(abs(step["train/ratio_mean"] - 1) > 1e-5 for step in steps[3])
    for step in steps[1] + steps[3]:
        assert step["rollout/logprob_error_max"] < 1e-4  # the sampler and the trainer agree
        assert step["rollout/logprob_error_mean"] <= step["rollout/logprob_error_max"]


def test_kept_groups_without_variance_count_in_the_denominator(run, recipe, monkeypatch):
    class Even(DigitsTask):
        """A signal in some groups only."""

        def score(self, problem, response: str) -> float:
            return super().score(problem, response) if int(problem.question[0]) % 2 else 0.0

    monkeypatch.setattr(session_module, "make_task", Even)
    steps = {}
    for drop in (True, False):
        changed = recipe.model_copy(deep=True)
        changed.rl.grpo.drop_zero_variance, changed.rl.optim.clip_grad = drop, 0.0
        steps[drop] = run("rl", f"drop_{drop}", changed, checkpoint=BASE)[0]
    assert 0 < steps[True]["rl/zero_variance_groups"] < 1
    assert steps[False]["train/grad_norm"] < 0.95 * steps[True]["train/grad_norm"]


def test_the_job_of_a_stage_names_its_folder_when_an_input_is_gone(run, recipe):
    with pytest.raises(UserError, match="inputs.checkpoint=.*does not exist"):
        run("sft", "gone", recipe, checkpoint=str(Path("nowhere")))
