"""lm-eval on the exported model of a run, and our own evaluation of the run, on the same problems."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval_agreement import STANDARD_ERRORS, answered, greedy_difference, metrics_of, sampled_difference
from small_recipe import small_recipe

from nemo_rmt.config import Recipe
from nemo_rmt.data.seeds import derived_seed
from nemo_rmt.data.tasks import make_task
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.rollout.engine import Sampling
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.rl import response_text
from nemo_rmt.stages.session import Session

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

PROBLEMS, SAMPLES = 64, 16
LIMIT_S = 400


def recipe_of(run: Path) -> Recipe:
    """A model that learns answers by heart, some of them wrong: it solves a part of the problems, with any seed."""
    stage = {"steps": 400, "micro_batch_size": 32, "global_batch_size": 32, "sequence_length": 64}
    recipe = small_recipe(
        str(run),
        iterations=1,
        model={"qkv_bias": False, "num_layers": 2},
        data={"tasks": [{"name": "chains", "options": {"lengths": [2, 3]}, "longer": {"lengths": [4]}}]},
        pretrain={"steps": 1},
        sft={**stage, "optim": {"lr": 4e-3, "warmup_steps": 20, "schedule": "linear"}},
        rollout={"max_new_tokens": 8, "batch_size": 256},
        evaluate={"problems": PROBLEMS, "samples": SAMPLES, "lm_eval": {"enabled": True}},
        **{name: {"enabled": False} for name in ("anneal", "rmt", "rl")},
    )
    recipe.data.sft_path = str(run.with_suffix(".jsonl"))
    seed = derived_seed(recipe.seed, "evaluate") % 2**31
    problems = itertools.islice(make_task(recipe.data.tasks[0]).problems("held_out", seed), PROBLEMS)
    with open(recipe.data.sft_path, "w") as file:
        for number, problem in enumerate(problems):
            for example in range(10):
                is_right = example < (3, 5, 7, 9)[number % 4]
                digit = int(problem.answer) if is_right else (int(problem.answer) + 1 + number % 9) % 10
                turns = [("user", problem.question), ("assistant", f"#{digit}")]
                file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return recipe


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """The evaluate stage's folder of a finished run, whose commands had no network they could use."""
    run = tmp_path_factory.mktemp("agreement") / "run"
    settings = run.with_suffix(".yaml")
    settings.write_text(resolved_yaml(recipe_of(run), comments=False))
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "nemo_rmt", "flywheel", "--yaml", str(settings)],
        env={**os.environ, **nowhere, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return run / "iteration_000" / "evaluate"


@pytest.fixture(scope="module")
def metrics(stage) -> dict[str, float]:
    return metrics_of(stage)


@pytest.mark.parametrize("task", ["chains", "chains_longer"])
def test_greedy_responses_are_the_same_to_the_letter(stage, task):
    """In fp32 the logits of the two implementations differ by rounding alone, and no choice is that close."""
    assert greedy_difference(stage, task) == 0
    records = answered(stage, f"{task}_greedy")
    job = StageJob.load(stage / "stage.yaml")
    with distributed(job.recipe.parallel, seed=1) as layout:
        session = Session(job, stage, layout)
        engine = InProcessEngine(session.frozen_model(session.require_input("sft")).modules, PROBLEMS)
        prompts = [session.tokenizer.chat_prompt([{"role": "user", "content": r["doc"]["question"]}]) for r in records]
        greedy = Sampling(job.recipe.rollout.max_new_tokens, frozenset({session.tokenizer.eod}), seed=0, temperature=0)
        ours = [response_text(session, each) for each in engine.generate(prompts, list(range(len(prompts))), greedy)]
    assert [record["resps"][0][0] for record in records] == ours


@pytest.mark.parametrize("task", ["chains", "chains_longer"])
def test_sampled_accuracies_agree_within_the_sampling_error(stage, task):
    difference, standard_error = sampled_difference(stage, task)
    assert abs(difference) <= STANDARD_ERRORS * standard_error
    assert standard_error < 0.03  # so that agreement says something


def test_the_model_solves_some_problems_so_that_agreement_says_something(metrics):
    assert 0.2 < metrics["tasks/chains/greedy"] < 0.9 and 0.2 < metrics["tasks/chains/pass@1"] < 0.9


def test_every_figure_comes_with_lm_evals_standard_error(metrics):
    for task in ("chains", "chains_longer"):
        for key in (f"{task}/pass@1", f"{task}/pass@{SAMPLES}", f"{task}_greedy/pass@1"):
            assert 0 <= metrics[f"lm_eval/{key}_stderr"] < 0.1
            assert 0 <= metrics[f"lm_eval/{key}"] <= 1


def test_the_exported_model_and_lm_evals_caches_are_in_the_stages_folder(stage):
    assert (stage / "hugging_face" / "config.json").is_file()
    assert list((stage / "lm_eval" / "cache").iterdir())
