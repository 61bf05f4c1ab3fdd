"""How lm-eval is started, watched and read; a package of the same name stands in for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_lm_eval
import psutil
import pytest
import yaml
from torchrun import run_ranks

from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages import evaluate
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.lm_eval import harness
from nemo_rmt.stages.session import Session

LIMIT_S = 60


@pytest.fixture(scope="module")
def session(recipe, data_folder):
    recipe = recipe.model_copy(deep=True)
    recipe.model.qkv_bias = False  # with qk_norm it is Qwen3's model
    recipe.evaluate.lm_eval.enabled = True
    job = StageJob(stage="evaluate", iteration=0, inputs={"data": str(data_folder)}, recipe=recipe)
    with distributed(recipe.parallel, seed=1) as layout:
        yield Session(job, data_folder.parent / "evaluate", layout)


@pytest.fixture
def stand_in(session, model, tmp_path, monkeypatch):
    """A function that says what the stand-in does; the model is exported."""
    path = fake_lm_eval.install(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(path))
    session.folder.mkdir(exist_ok=True)
    harness.export(session, model.modules)
    return lambda what: monkeypatch.setenv("FAKE", what)


def seen(session) -> dict:
    return json.loads((session.folder / "lm_eval" / "seen.json").read_text())


def test_metrics_have_the_names_of_task_metric_and_filter(session, stand_in):
    stand_in("work")
    metrics = harness.measure(session)
    tasks = [f"chains{longer}{greedy}" for longer in ("", "_longer") for greedy in ("", "_greedy")]
    figures = {"pass@1": 0.25, "pass@1_stderr": 0.1, "f1,strict": 1.0}
    assert metrics == {f"lm_eval/{task}/{key}": value for task in tasks for key, value in figures.items()}


def test_it_is_told_of_the_exported_model_and_left_offline_and_alone(session, stand_in, monkeypatch):
    stand_in("work")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "HF_TOKEN": "secret"}.items():
        monkeypatch.setenv(name, value)
    harness.measure(session)
    configuration = yaml.safe_load((session.folder / "lm_eval" / "config.yaml").read_text())
    model = configuration["model_args"]
    assert Path(model["pretrained"]) == session.folder / "hugging_face"
    assert (Path(model["pretrained"]) / "model.safetensors").is_file()
    assert model["dtype"] == "float32" and model["add_bos_token"] is False
    assert configuration["apply_chat_template"] is True and configuration["device"] == "cpu"
    environment = seen(session)["environment"]
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "HF_TOKEN"} & set(environment)
    assert environment["HF_HUB_OFFLINE"] == environment["HF_DATASETS_OFFLINE"] == "1"
    assert Path(environment["HF_HOME"]).is_relative_to(session.folder)


def test_no_question_is_cut_off_however_long_it_is(session, stand_in, monkeypatch):
    monkeypatch.setattr(session.tokenizer, "chat_prompt", lambda messages: [1] * 1000)
    configuration = yaml.safe_load(harness.write_configuration(session).read_text())
    assert configuration["model_args"]["max_length"] == 1000 + session.recipe.rollout.max_new_tokens


def test_a_failure_shows_the_end_of_its_log(session, stand_in):
    stand_in("fail")
    with pytest.raises(RuntimeError, match=r"log/lm_eval.log ends with: lm-eval is here\nValueError: the model talks"):
        harness.measure(session)


def test_it_is_ended_when_the_stage_is_interrupted(session, stand_in, monkeypatch):
    stand_in("hang")
    sleep = time.sleep

    def interrupt(seconds: float) -> None:
        sleep(0.1)
        if (session.folder / "lm_eval" / "seen.json").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(harness.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        harness.measure(session)
    assert not psutil.pid_exists(seen(session)["pid"])


def test_it_ends_with_the_process_that_started_it_however_that_ends(session, stand_in):
    stand_in("hang")
    configuration = harness.write_configuration(session)
    code = f"""
import sys, time
from pathlib import Path
from nemo_rmt.stages.lm_eval.harness import start
start(Path({str(configuration)!r}), Path({str(session.folder)!r}))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (session.folder / "lm_eval" / "seen.json").exists():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    while psutil.pid_exists(pid := seen(session)["pid"]) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_wait_longer_than_a_collective_may_take_and_only_output_counts_as_progress(tmp_path):
    output = run_ranks(Path(__file__).with_name("lm_eval_worker.py"), 2, str(tmp_path / "lm_eval.log"))
    assert output.count("saw it all") == 2


def test_a_model_that_cannot_be_exported_is_refused_before_anything_is_measured(session, monkeypatch):
    monkeypatch.setattr(session, "recipe", session.recipe.model_copy(deep=True))
    session.recipe.model.qkv_bias = True
    monkeypatch.setattr(session, "frozen_model", None)
    with pytest.raises(UserError, match="model.qkv_bias=True"):
        evaluate.run(session)
