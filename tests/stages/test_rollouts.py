"""What the stages make of their sampler: one step ahead, from older weights, wrong, or lost."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest

from nemo_rmt.config import Recipe
from nemo_rmt.data.tasks import ChainTask
from nemo_rmt.errors import Diverged
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import EngineLost
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages import pretrain, rl, rmt, rollouts
from nemo_rmt.stages import session as session_module
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session
from nemo_rmt.tracking import read_metrics

STAGES = {"pretrain": pretrain, "rl": rl, "rmt": rmt}
BASE = "base/pretrain/checkpoints/step_00000005"
TIMINGS = {"time", "train/tokens_per_s", "train/step_s", "train/model_tflops_per_s"}
TIMINGS |= {"rollout/wait_s", "rollout/tokens_per_s"}


class DigitsTask(ChainTask):
    """Chains scored by the share of digits, so that an untrained model's groups have a gradient."""

    def score(self, problem, response: str) -> float:
        return sum(character.isdigit() for character in response) / max(1, len(response))


class CopyEngine(InProcessEngine):
    """Samples from a copy of the weights, as a sampler elsewhere does.

    updates: how many it takes; later ones never arrive. lives: how many times it can be asked.
    """

    def __init__(self, session, training, updates: float = math.inf, lives: float = math.inf):
        chunks = build_model(session.recipe.model, session.recipe.parallel, session.vocab_size)
        super().__init__(chunks, session.recipe.rollout.batch_size, lambda: self.taken)
        self.training, self.updates, self.lives, self.taken = training, updates, lives, 0

    def update_weights(self):
        if self.updates:
            self.updates -= 1
            self.taken = self.training.done
            for copy, live in zip(self.chunks, self.training.model.modules, strict=True):
                copy.load_state_dict(live.state_dict())

    def _sample(self, *arguments):
        self.lives -= 1
        if self.lives < 0:
            raise EngineLost("the sampler ended")
        return super()._sample(*arguments)


@pytest.fixture(scope="module")
def run(recipe, data_folder, tmp_path_factory):
    """A function that runs a stage with rollout settings of its own and returns its folder."""
    folder = tmp_path_factory.mktemp("rollouts")
    with distributed(recipe.parallel, recipe.seed) as layout, pytest.MonkeyPatch.context() as patched:
        patched.setattr(session_module, "make_task", DigitsTask)

        def run(stage: str, name: str, copy: dict | None = None, **changes):
            target = folder / name / stage
            target.mkdir(parents=True, exist_ok=True)
            inputs = {"data": str(data_folder)} | ({} if stage == "pretrain" else {"checkpoint": str(folder / BASE)})
            values = recipe.model_dump() | {"rollout": recipe.rollout.model_dump() | changes}
            values["rl"]["optim"]["lr"] = values["rmt"]["optim"]["lr"] = 5e-3
            job = StageJob(stage=stage, iteration=0, inputs=inputs, recipe=Recipe.model_validate(values))
            with pytest.MonkeyPatch.context() as engines:
                if copy is not None:
                    engines.setattr(rollouts, "build_engine", lambda *ends: CopyEngine(*ends, **copy))
                STAGES[stage].run(Session(job, target, layout))
            return target

        run("pretrain", "base")
        yield run


VLLM = {"engine": "vllm", "vllm": {"placement": "server"}}
AHEAD = {**VLLM, "lag": 1, "max_weight_lag": 1}


def steps_of(folder) -> list[dict]:
    return [
        {name: value for name, value in step.items() if name not in TIMINGS}
        for step in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("stage", ["rl", "rmt"])
def test_a_copy_updated_before_every_step_samples_what_the_live_weights_do(run, stage):
    live, copied = steps_of(run(stage, "live")), steps_of(run(stage, "copied", copy={}))
    assert copied == live and len(live) == 5
    assert all(step["rollout/weight_lag"] == 0 for step in copied)


@pytest.mark.parametrize("ahead", [{}, AHEAD], ids=["now", "one step ahead"])
def test_how_fast_responses_come_is_logged(run, ahead):
    steps = read_metrics(run("rl", f"speed_{len(ahead)}", copy={}, **ahead) / "metrics.jsonl")
    for step in steps:
        sampled = step["rl/response_length"] * 32
        if not ahead:
            assert step["rollout/tokens_per_s"] > sampled / step["rollout/wait_s"]  # which the verifier is part of
        assert 0 < sampled / step["rollout/tokens_per_s"]


@pytest.mark.parametrize("stage", ["rl", "rmt"])
def test_the_correction_is_1_where_sampler_and_trainer_agree(run, stage):
    corrected, plain = steps_of(run(stage, "corrected", copy={}, **VLLM)), steps_of(run(stage, "plain", copy={}))
    group = {"rl": "train", "rmt": "rl"}[stage]
    for step, without in zip(corrected, plain, strict=True):
        assert step.pop(f"{group}/importance_mean") == pytest.approx(1, abs=1e-5)
        assert step == pytest.approx(without, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", ["rl", "rmt"])
def test_one_step_ahead_the_weights_are_one_step_old_and_the_difference_is_measured_and_corrected(run, stage):
    fresh, ahead = steps_of(run(stage, "fresh", copy={}, **VLLM)), steps_of(run(stage, "ahead", copy={}, **AHEAD))
    assert [step["rollout/weight_lag"] for step in ahead] == [0, 1, 1, 1, 1]
    group = {"rl": "train", "rmt": "rl"}[stage]
    for old, new in zip(ahead[2:], fresh[2:], strict=True):  # the first step's learning rate is 0
        assert new["rollout/token_mult_prob_error"] == pytest.approx(1, abs=1e-5)
        assert old["rollout/token_mult_prob_error"] > 1.001
        assert 1e-3 < old["rollout/logprob_error_mean"] < old["rollout/logprob_error_max"]
        assert 0 < old[f"{group}/importance_mean"] <= 2 and math.isfinite(old["train/grad_norm"])
        assert old["train/grad_norm"] > 0 and old["train/skipped_steps"] == 0


def test_a_sampler_that_misses_updates_is_refused_and_what_was_trained_is_kept(run):
    with pytest.raises(EngineLost, match="step 3 were sampled from weights 2 steps old, and rollout.max_weight_lag=1"):
        run("rl", "stale", copy={"updates": 1}, **{**VLLM, "max_weight_lag": 1})
    kept = run("rl", "stale", copy={}, **VLLM)
    assert [step["step"] for step in steps_of(kept)] == [1, 2, 3, 4, 5]
    assert json.loads((kept / "result.json").read_text())["status"] == "done"


def test_probabilities_further_apart_than_the_limit_stop_the_stage(run, caplog):
    limits = {**AHEAD, "mismatch_warning": 1.0001, "mismatch_limit": 1.0005}
    with caplog.at_level(logging.WARNING), pytest.raises(Diverged, match="rollout.mismatch_limit=1.0005"):
        run("rl", "limited", copy={}, **limits)


def test_what_is_not_a_number_is_left_to_the_guard_and_what_is_infinite_stops_the_stage(run, recipe):
    session = SimpleNamespace(recipe=recipe, layout=SimpleNamespace(rank=0))
    sampler = rollouts.Sampler(session, SimpleNamespace(done=3), engine=None)
    assert sampler.compare({"rollout/token_mult_prob_error": math.nan}, []) == {"rollout/logprob_error_max": 0}
    with pytest.raises(Diverged, match="step 4: .* factor of inf on average"):
        sampler.compare({"rollout/token_mult_prob_error": math.inf}, [])


def test_probabilities_that_differ_are_warned_of_on_the_terminal_once(run, caplog, capsys):
    with caplog.at_level(logging.WARNING, "nemo_rmt.stages.rollouts"):
        run("rl", "fresh_and_quiet", copy={}, **VLLM)
        assert not caplog.records
        run("rl", "warned", copy={}, **{**AHEAD, "mismatch_warning": 1.0005})
    assert caplog.text.count("differ by a factor of") == 4  # all but the first step, which samples from its own weights
    assert capsys.readouterr().out.count("differ by a factor of") == 1


@pytest.mark.parametrize("stage", ["rl", "rmt"])
def test_a_lost_sampler_ends_the_stage_with_its_last_step_saved(run, stage):
    undisturbed = steps_of(run(stage, "undisturbed", copy={}))
    with pytest.raises(EngineLost):
        run(stage, "lost", copy={"lives": 3})
    folder = run(stage, "lost")
    assert (folder / "checkpoints").is_dir() and steps_of(folder) == undisturbed
