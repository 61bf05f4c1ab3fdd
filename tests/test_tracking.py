"""Metrics: the file a killed and resumed run leaves, TensorBoard, W&B and the terminal."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import types

import pytest

from nemo_rmt.config import Tracking
from nemo_rmt.errors import UserError
from nemo_rmt.stopping import Stopped
from nemo_rmt.tracking import SAMPLES, SKIPPED, Metrics, read_metrics

QUIET = Tracking(tensorboard=False)


def write_steps(folder, first, last, **options):
    with Metrics(folder, options.pop("tracking", QUIET), title="0/anneal", total_steps=10, **options) as metrics:
        for step in range(first, last + 1):
            metrics.log(step, {"train/loss": 1 / step, "train/tokens_per_s": 18_200.0})


def test_every_step_is_one_json_object_readable_at_once(tmp_path):
    with Metrics(tmp_path, QUIET, title="0/anneal", total_steps=3) as metrics:
        metrics.log(1, {"train/loss": 2.5})
        (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert record["step"] == 1 and record["train/loss"] == 2.5 and record["time"] > 1.6e9


def test_a_resumed_file_has_each_step_once_and_loses_steps_beyond_the_checkpoint(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 10, resume_step=4)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_torn_last_line_is_ignored_and_dropped_on_resume(tmp_path):
    write_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "train/lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_steps(tmp_path, 3, 3, resume_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("name", [SKIPPED, SAMPLES])
def test_the_files_beside_it_lose_steps_beyond_the_checkpoint_too(tmp_path, name):
    for first, last, resume in ((1, 4, 0), (3, 5, 2)):
        with Metrics(tmp_path, QUIET, title="t", total_steps=5, resume_step=resume) as metrics:
            for step in range(first, last + 1):
                metrics.append(name, {"step": step, "loss": math.inf, "samples": [f"web:{first}"]})
    records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["samples"] for record in records] == [["web:1"]] * 2 + [["web:3"]] * 3
    assert {record["loss"] for record in records} == {None}


def test_starting_anew_empties_an_earlier_file(tmp_path):
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_become_null(tmp_path, value):
    with Metrics(tmp_path, QUIET, title="0/rl", total_steps=1) as metrics:
        metrics.log(1, {"train/loss": value})
    assert '"train/loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] is None


def test_other_ranks_write_nothing(tmp_path, capsys):
    write_steps(tmp_path / "stage", 1, 10, enabled=False, tracking=Tracking(wandb_project="never"))
    assert not (tmp_path / "stage").exists() and capsys.readouterr().out == ""


def test_a_missing_file_has_no_steps(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_plain_lines_come_at_the_interval_and_the_last_step(tmp_path, capsys):
    with Metrics(tmp_path, Tracking(tensorboard=False, log_interval=4), title="0/rl", total_steps=10) as metrics:
        for step in range(1, 11):
            metrics.log(step, {"train/loss": 1.2341, "rl/reward_mean": 0.5, "train/tokens_per_s": 18_234.0})
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)/10", line)[1] for line in lines] == ["4", "8", "10"]
    assert re.fullmatch(r"\[0/rl\] step 4/10 loss 1\.234 reward 0\.500 18\.2k tok/s 0:00 left", lines[0])
    assert lines[-1].endswith("tok/s")


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    write_steps(tmp_path, 1, 10)
    output = capsys.readouterr().out
    assert "10/10" in output and "0/anneal" in output and "loss 0.100 18.2k tok/s" in output


def test_tensorboard_hides_the_steps_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, resume in ((1, 6, 0), (4, 10, 3)):
        write_steps(tmp_path, first, last, resume_step=resume, tracking=Tracking())
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


def fake_wandb(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    module = types.SimpleNamespace(init=lambda **options: calls.append(("init", options)) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_continues_the_same_run_on_resume(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    tracking = Tracking(tensorboard=False, wandb_project="mid-training")
    write_steps(tmp_path, 1, 2, tracking=tracking)
    write_steps(tmp_path, 3, 3, tracking=tracking, resume_step=2)
    first, second = [call[1] for call in calls if call[0] == "init"]
    assert first["project"] == "mid-training" and first["name"] == "0/anneal"
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2, 3]
    assert calls[-1] == ("finish", 0)


def test_wandb_learns_of_a_failed_stage(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    with pytest.raises(RuntimeError, match="diverged"):
        with Metrics(tmp_path, Tracking(tensorboard=False, wandb_project="p"), title="t", total_steps=1):
            raise RuntimeError("diverged")
    assert calls[-1] == ("finish", 1)


def test_wandb_does_not_take_a_stop_on_request_for_a_failure(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    with pytest.raises(Stopped):
        with Metrics(tmp_path, Tracking(tensorboard=False, wandb_project="p"), title="t", total_steps=1):
            raise Stopped("SIGTERM")
    assert calls[-1] == ("finish", 0)


def test_wandb_not_installed_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracking.wandb_project=p needs .* install nemo-rmt\[wandb\]"):
        write_steps(tmp_path, 1, 1, tracking=Tracking(tensorboard=False, wandb_project="p"))


def test_importing_tracking_imports_no_torch():
    program = "import sys, nemo_rmt.tracking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
