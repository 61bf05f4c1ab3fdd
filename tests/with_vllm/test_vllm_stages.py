"""The stages with vLLM as their sampler, wherever it runs: they learn as with the training processes' own."""

from __future__ import annotations

import json
import math
import os
import signal

import httpx
import pytest
import torch
from small_recipe import small_recipe

from nemo_rmt import config
from nemo_rmt.config import Recipe
from nemo_rmt.data.tasks import ChainTask
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import Diverged
from nemo_rmt.families import config_json
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import EngineLost
from nemo_rmt.rollout.vllm.process import ServerProcess
from nemo_rmt.rollout.vllm.server import ServerBackend
from nemo_rmt.stages import data, pretrain, rl, rmt
from nemo_rmt.stages import session as session_module
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session
from nemo_rmt.tracking import read_metrics

pytest.importorskip("vllm", reason="vLLM is not installed")

STAGES = {"pretrain": pretrain, "rl": rl, "rmt": rmt}
BASE = "base/pretrain/checkpoints/step_00000005"
FAST = {"lr": 1e-2, "warmup_steps": 0}
STEPS = 10
ON_GPU = torch.cuda.is_available()
LOGPROB_ERROR, PROBABILITY_ERROR = (0.5, 0.05) if ON_GPU else (1e-4, 1e-4)
"""Of one token, nats, and of the mean factor: in bf16, and in fp32."""
with_a_server = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="a server needs a GPU of its own")
SERVER = {"placement": "server", "start_timeout_s": 400, "request_timeout_s": 120}


class DigitsTask(ChainTask):
    """Chains scored by the share of digits, which an untrained model learns within ten steps."""

    def score(self, problem, response: str) -> float:
        return sum(character.isdigit() for character in response) / max(1, len(response))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    grpo = {"samples_per_group": 8}
    return small_recipe(
        "unused",
        model={"qkv_bias": False, "head_dim": 32, "precision": "bf16" if ON_GPU else "fp32"},
        data={"corpora": [{"name": "chains", "kind": "chains", "num_documents": 300, "held_out": 0.2}]},
        rmt={
            "steps": STEPS,
            "global_batch_size": 16,
            "reward": {"length_weight": 0.5},
            "budget": {"initial": 8, "decay": 0.9},
            "grpo": grpo,
            "optim": FAST,
        },
        rl={"steps": STEPS, "global_batch_size": 64, "micro_batch_size": 16, "grpo": grpo, "optim": FAST},
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A function that runs a stage with rollout settings of its own and returns its steps."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "data").mkdir()
    data.run(StageJob(stage="data", iteration=0, recipe=recipe, run_dir=".."), folder / "data")
    with distributed(recipe.parallel, recipe.seed) as layout, pytest.MonkeyPatch.context() as patched:
        patched.setattr(session_module, "make_task", DigitsTask)

        def run(stage: str, name: str, **rollout) -> list[dict]:
            target = folder / name / stage
            target.mkdir(parents=True, exist_ok=True)
            inputs = {"data": str(folder / "data")}
            inputs |= {} if stage == "pretrain" else {"checkpoint": str(folder / BASE)}
            changed = Recipe.model_validate(recipe.model_dump() | {"rollout": recipe.rollout.model_dump() | rollout})
            STAGES[stage].run(
                Session(StageJob(stage=stage, iteration=0, inputs=inputs, recipe=changed), target, layout)
            )
            return read_metrics(target / "metrics.jsonl")

        run.data = folder / "data"
        run("pretrain", "base")
        yield run


def rewards(stage: str, steps: list[dict]) -> tuple[float, float]:
    """The mean reward of the first two and of the last two steps."""
    values = [step[f"{stage}/reward_mean"] for step in steps]
    assert len(values) == STEPS
    return sum(values[:2]) / 2, sum(values[-2:]) / 2


def assert_learned_alike(stage: str, steps: list[dict], expected: list[dict]) -> None:
    """Both learn, and to about the same reward: with other random numbers no step is the same."""
    (before, after), (_, reached) = rewards(stage, steps), rewards(stage, expected)
    assert before < reached / 2 and after > reached / 2, (before, after, reached)


def assert_fresh_and_exact(steps: list[dict]) -> None:
    """Every step was sampled by its own weights: the two engines' log-probabilities are the same."""
    for number, step in enumerate(steps):
        assert step["rollout/weight_version"] == number and step["rollout/weight_lag"] == 0
        assert step["rollout/logprob_error_mean"] <= step["rollout/logprob_error_max"] < LOGPROB_ERROR
        assert step["rollout/token_mult_prob_error"] == pytest.approx(1, abs=PROBABILITY_ERROR)
        assert step["rollout/sync_s"] > 0 and step["rollout/sample_s"] > 0


@pytest.mark.parametrize("stage", ["rl", "rmt"])
def test_a_colocated_vllm_learns_as_the_in_process_engine_does(run, stage):
    steps = run(stage, "colocated", engine="vllm", vllm={"placement": "colocated"})
    assert_fresh_and_exact(steps)
    assert_learned_alike(stage, steps, run(stage, "beside_colocated"))
    if stage == "rmt":  # branches of one document and copies of one prompt
        assert max(step["rollout/prefix_cached"] for step in steps) > 0.1


def kill_when_asked(monkeypatch, call: int) -> None:
    """SIGKILL the stage's server as it is asked for that call's responses."""
    complete, calls = ServerBackend.complete, []

    def struck(backend, requests):
        calls.append(len(requests))
        if len(calls) == call:
            os.kill(backend._process.pid, signal.SIGKILL)
        return complete(backend, requests)

    monkeypatch.setattr(ServerBackend, "complete", struck)


@with_a_server
def test_a_server_that_dies_is_started_again_and_the_stage_learns(run, recipe, monkeypatch):
    kill_when_asked(monkeypatch, 5)
    steps = run("rl", "server", engine="vllm", vllm=SERVER)
    assert_fresh_and_exact(steps)
    assert_learned_alike("rl", steps, run("rl", "beside_server"))
    assert [step["rollout/restarts"] for step in steps] == [0] * 4 + [1] * (STEPS - 4)


@with_a_server
def test_a_server_that_dies_again_ends_the_stage_and_nothing_is_lost(run, monkeypatch):
    kill_when_asked(monkeypatch, 5)
    with pytest.raises(EngineLost, match="(?s)killed by signal 9.*vllm_server.log.*rollout.vllm.restarts=0"):
        run("rl", "lost", engine="vllm", vllm={**SERVER, "restarts": 0})
    steps = run("rl", "lost")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert ["rollout/sync_s" in step for step in steps] == [True] * 4 + [False] * (STEPS - 4)


@pytest.fixture(scope="module")
def url(recipe, run, tmp_path_factory):
    """A server that runs already."""
    folder = tmp_path_factory.mktemp("running")
    tokens = Tokenizer.load(run.data / "tokenizer")
    (folder / "config.json").write_text(json.dumps(config_json(recipe.model, tokens.vocab_size, eos=tokens.eod)))
    settings = config.Rollout.model_validate({**recipe.rollout.model_dump(), "engine": "vllm", "vllm": SERVER})
    server = ServerProcess(
        settings, recipe.model, model_folder=folder, transfer="nccl" if ON_GPU else "gloo", log=folder / "log"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_API_KEY", server.key)
        server.wait_until(lambda: answers(server))
        yield server.url
    server.close()


def answers(server: ServerProcess) -> bool:
    try:
        headers = {"Authorization": f"Bearer {server.key}"}
        return httpx.get(f"{server.url}/health", headers=headers).status_code == 200
    except httpx.TransportError:
        return False


@with_a_server
def test_rmt_learns_on_a_server_that_runs_already(run, url):
    steps = run("rmt", "running", engine="vllm", vllm={**SERVER, "url": url})
    assert_fresh_and_exact(steps)
    assert_learned_alike("rmt", steps, run("rmt", "beside_running"))


@with_a_server
def test_one_step_ahead_of_the_training_the_mismatch_is_measured_and_corrected_and_the_stage_learns(run, url):
    ahead = {"engine": "vllm", "lag": 1, "max_weight_lag": 1, "vllm": {**SERVER, "url": url}}
    steps = run("rl", "ahead", **ahead)
    assert [step["rollout/weight_lag"] for step in steps] == [0] + [1] * (STEPS - 1)
    assert [step["rollout/weight_version"] for step in steps] == [0, *range(STEPS - 1)]
    for step in steps[1:]:
        assert 1.001 < step["rollout/token_mult_prob_error"] < 2
        assert 0 < step["train/importance_mean"] <= 2 and math.isfinite(step["train/grad_norm"])
    before, after = rewards("rl", steps)
    assert after > 2 * before
    with pytest.raises(Diverged, match="rollout.mismatch_limit=1.001"):
        run("rl", "limited", **ahead, mismatch_warning=1.001, mismatch_limit=1.001)
