"""The commands, as a person types them: output, one-line errors and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_flywheel import fake

from nemo_rmt import cli, flywheel
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.stages.job import StageJob
from nemo_rmt.status import ago

NO_TEXT = "data.corpora=[{name: programs, kind: chains}]"


@pytest.fixture
def fake_stages(monkeypatch):
    """Commands start the stand-in for a stage."""
    for function in (flywheel.run_flywheel, flywheel.run_one_stage):
        monkeypatch.setitem(function.__kwdefaults__, "command", fake)
    monkeypatch.setattr(flywheel, "_write_report", lambda run: 0)


def nemo_rmt(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nemo_rmt", *arguments], capture_output=True, text=True, cwd=cwd, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["flywheel"], "name a recipe"),
        (["flywheel", "tinny"], "did you mean tiny"),
        (["flywheel", "tiny", "small"], "one recipe expected"),
        (["flywheel", "tiny", "--fast"], "--fast"),
        (["flywheel", "tiny", "anneal.remti.epsilon=1"], "anneal.remit.epsilon"),
        (["flywheel", "tiny", "iterations=many"], 'iterations="many"'),
        (["flywheel", "tiny", "--yaml", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["flywheel", "tiny", "parallel.tensor=3", "cluster.gpus_per_node=3"], "num_attention_heads"),
        (["flywheel", "tiny", "rl.micro_batch_size=100"], "rl.global_batch_size=256"),
        (["flywheel", "tiny", "anneal.remit.reference=null"], "remit.reference"),
        (["flywheel", "tiny", "data.corpora.0={name: a, kind: jsonl, path: /does/not/exist}"], "/does/not/exist"),
        (["flywheel", "tiny", "run_dir=/proc/run"], "/proc/run"),
        (["stage"], "name a stage"),
        (["stage", "anneal", "tiny", "--iteration", "x"], "--iteration"),
        (["stage", "polish", "tiny", NO_TEXT], "no stage polish"),
        (["stage", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["stage", "stage.yaml", "tiny"], "takes no recipe"),
        (["stage", "stage.yaml", "--profile"], "tracking.profile: true"),
        (["report", "/tmp"], "not a run folder"),
        (["status", "/tmp"], "not a run folder"),
        (["status", "tinny"], "did you mean tiny"),
        (["recipes", "drop"], "list or show"),
        (["data", "tiny"], "data takes build or score"),
        (["data", "score", "tiny"], "data score needs checkpoint=FOLDER"),
        (["data", "score", "tiny", "checkpoint=/c"], "data score needs cache=FOLDER"),
        (["data", "score", "tiny", "checkpoint=/c", "cache=/d", "sequence_length=x"], "sequence_length=x is not"),
        (["data", "score", "tiny", "checkpoint=/c", "cache=/d", "sequence_length=1"], "sequence_length=1 is not"),
        (["data", "score", "tiny", "checkpoint=/c", "cache=/d"], "nemo-rmt data build tiny run_dir=runs/tiny first"),
        (["data", "score", "checkpoint=/c", "cache=/d"], "name a recipe"),
        (["import", "source=/does/not/exist"], "target="),
        (["import", "source=/does/not/exist", "target=there"], "/does/not/exist"),
        (["plan", "qwen3_14b", "paralel.tensor=4"], "parallel.tensor"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nemo-rmt: error: ") and captured.err.count("\n") == 1
    assert words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_python_m_nemo_rmt_is_the_command_and_starts_fast(tmp_path):
    started = time.monotonic()
    done = nemo_rmt("flywheel", "tiny", "iterations=none", cwd=tmp_path)
    assert time.monotonic() - started < 5
    assert done.returncode == 2
    assert done.stderr.startswith("nemo-rmt: error: iterations") and "Traceback" not in done.stderr


def test_a_recipe_is_shown_as_yaml_that_loads_overrides_included(tmp_path, capsys):
    assert cli.main(["recipes", "show", "tiny", "seed=9"]) == 0
    shown = capsys.readouterr().out
    assert "# Peak learning rate." in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(None, [tmp_path / "shown.yaml"], []) == load_recipe("tiny", [], ["seed=9"])


def test_overrides_may_stand_before_and_after_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("part.yaml").write_text("sft: {steps: 5}")
    assert cli.main(["flywheel", "tiny", NO_TEXT, "--dry-run", "seed=9", "--yaml", "part.yaml", "rl.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "seed: 1234 -> 9" in out and "sft.steps: 16 -> 5" in out and "rl.steps: 40 -> 3" in out
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", [["flywheel"], ["stage", "data"], ["evaluate"]], ids=lambda command: command[0])
def test_profile_is_a_setting_of_the_recipe(tmp_path, command):
    started = []

    class Recorder(cli.Starter):
        def run_flywheel(self, recipe, *, dry_run):
            started.append(recipe.tracking.profile)
            return 0

        def run_one_stage(self, recipe, stage, iteration, *, download=False):
            return self.run_flywheel(recipe, dry_run=False)

    for option in ([], ["--profile"]):
        assert cli.main([*command, "tiny", *option], Recorder()) == 0
    assert started == [False, True]


def test_a_flywheel_and_its_single_stages_share_the_run_folder(tmp_path, fake_stages, capfd):
    recipe = ["tiny", f"run_dir={tmp_path}/run", NO_TEXT]
    assert cli.main(["evaluate", *recipe]) == 2
    assert not (tmp_path / "run" / "state.json").exists()
    assert cli.main(["data", "build", *recipe]) == 0
    assert cli.main(["stage", "pretrain", *recipe]) == 0
    assert cli.main(["stage", "anneal", *recipe, "--iteration", "1"]) == 2
    assert "iteration 0 rl" in capfd.readouterr().err
    assert cli.main(["flywheel", *recipe]) == 0
    (tmp_path / "run" / "iteration_001" / "evaluate" / "result.json").unlink()
    assert cli.main(["evaluate", *recipe]) == 0
    ran = (tmp_path / "run" / "ran.txt").read_text().split()
    assert ran[:3] == ["0/data", "0/pretrain", "0/anneal"] and ran[-2:] == ["1/evaluate", "1/evaluate"]
    assert len(ran) == 13


def test_the_status_of_a_run_that_does_not_exist_yet_is_pending_throughout(tmp_path, capsys):
    assert cli.main(["status", "tiny", f"run_dir={tmp_path}/run", "iterations=1", "--plain"]) == 0
    stages = ("data", "pretrain", "anneal", "rmt", "sft", "rl", "evaluate")
    assert capsys.readouterr().out.splitlines() == [f"0\t{stage}\tpending" for stage in stages]
    assert not (tmp_path / "run").exists()


def test_the_status_of_a_run_says_what_is_done_and_what_has_to_be_made_again(tmp_path, fake_stages, capsys):
    recipe = ["tiny", f"run_dir={tmp_path}/run", NO_TEXT, "iterations=1"]
    assert cli.main(["flywheel", *recipe]) == 0
    shutil.move(tmp_path / "run", tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["status", f"{tmp_path}/moved", "--plain"]) == 0
    assert {line.split("\t")[2] for line in capsys.readouterr().out.splitlines()} == {"done"}
    state = tmp_path / "moved" / "state.json"
    changed = json.loads(state.read_text())
    changed["iterations"][0]["anneal"]["id"] = "made again"
    state.write_text(json.dumps(changed))
    assert cli.main(["status", *recipe, f"run_dir={tmp_path}/moved", "--plain"]) == 0
    found = dict(line.split("\t")[1:] for line in capsys.readouterr().out.splitlines())
    assert found["anneal"] == "done"
    assert all(found[stage] == "outdated" for stage in ("rmt", "sft", "rl", "evaluate"))


def test_the_status_of_a_stage_shows_how_far_it_is(tmp_path, fake_stages, capsys):
    recipe = ["tiny", f"run_dir={tmp_path}/run", NO_TEXT]
    assert cli.main(["data", "build", *recipe]) == 0
    (tmp_path / "run" / "plan.json").write_text('{"0/pretrain": [{"save": 40, "exit": 3}, {"save": 80, "exit": 3}]}')
    assert cli.main(["stage", "pretrain", *recipe]) == 1
    assert cli.main(["stage", "pretrain", *recipe]) == 1
    folder = tmp_path / "run" / "iteration_000" / "pretrain"
    (folder / "metrics.jsonl").write_text(
        f'{{"step": 81, "time": 1}}\n{{"step": 82, "time": {time.time() - 190}}}\n{{"st'
    )
    (folder / "skipped.jsonl").write_text('{"step": 5}\n{"step": 9}\n')
    capsys.readouterr()
    assert cli.main(["status", *recipe]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "iteration 0 pretrain" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["iteration 0 pretrain", "failed", "2", "82 / 1800", "step_00000080", "2", "3 min ago"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (59, "59 s"), (3599, "60 min"), (7 * 3600, "7.0 h"), (10**6, "11.6 days")]
)
def test_times_are_told_in_the_unit_that_fits(seconds, words):
    assert ago(seconds) == words


def test_a_failed_stage_is_exit_code_1(tmp_path, fake_stages, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text('{"0/data": 3}')
    assert cli.main(["flywheel", "tiny", f"run_dir={tmp_path}/run", NO_TEXT]) == 1
    assert "nemo-rmt: iteration 0 data failed: rank 0 ended with exit status 3" in capfd.readouterr().err


def test_a_saved_stage_runs_alone_in_a_folder_of_its_own(tmp_path, fake_stages, monkeypatch, capfd):
    monkeypatch.setattr("nemo_rmt.lone_stage.worker_command", fake)
    assert cli.main(["data", "build", "tiny", f"run_dir={tmp_path}/run", NO_TEXT]) == 0
    saved = tmp_path / "run" / "iteration_000" / "data" / "stage.yaml"
    assert StageJob.load(saved).stage == "data"
    assert cli.main(["stage", str(saved)]) == 2
    assert "result already" in capfd.readouterr().err
    copy = tmp_path / "run" / "iteration_000" / "again" / "stage.yaml"
    copy.parent.mkdir()
    copy.write_text(saved.read_text())
    assert cli.main(["stage", str(copy)]) == 0
    assert (copy.parent / "result.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": "polish"}, "polish"),
        ({"inputs": {"data": "iteration_000/gone"}}, "data=iteration_000/gone"),
        ({"x": 1}, "x"),
    ],
)
def test_a_wrong_stage_file_is_exit_code_2(tmp_path, capsys, change, words):
    job = StageJob(stage="sft", iteration=0, recipe=load_recipe("tiny", [], [])).model_dump(mode="json")
    path = tmp_path / "run" / "iteration_000" / "sft" / "stage.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({**job, **change}))
    assert cli.main(["stage", str(path)]) == 2
    assert words in capsys.readouterr().err
