"""The state machine that runs a chain: what is skipped, resumed and made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_checkpoint import write_checkpoint
from fake_flywheel import FIRST, SECOND, changed, fake, ran, small_chain

from nemo_rmt import flywheel, preflight
from nemo_rmt.config import LMEval, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.flywheel import run_flywheel, run_one_stage
from nemo_rmt.recipe_io import load_recipe, resolved_yaml
from nemo_rmt.run_folder import RunFolder


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """A chain in a folder of its own; the report is not this file's subject."""
    monkeypatch.setattr(flywheel, "_write_report", lambda run: 0)
    return small_chain(tmp_path / "run")


def faults(recipe: Recipe, **plan: object) -> None:
    Path(recipe.run_dir).mkdir(exist_ok=True)
    (Path(recipe.run_dir) / "plan.json").write_text(json.dumps({k.replace("_", "/"): v for k, v in plan.items()}))


def test_a_run_does_every_stage_once_and_a_second_start_does_nothing(recipe, capfd):
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == FIRST + SECOND
    record = RunFolder(Path(recipe.run_dir)).load_state().record(1, "anneal")
    assert (record.status, record.attempts) == ("done", 1)
    assert record.checkpoint == "iteration_001/anneal/checkpoints/step_00000001"
    assert load_recipe(None, [Path(recipe.run_dir) / "flywheel.yaml"], []) == recipe
    started = time.monotonic()
    assert run_flywheel(recipe, command=fake) == 0
    assert time.monotonic() - started < 2
    assert ran(recipe) == []
    assert "train/loss 1.5" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("deleted", "again"),
    [
        ("iteration_001/rl", ["1/rl", "1/evaluate"]),
        ("iteration_000/rl", ["0/rl", "0/evaluate", *SECOND]),
        ("iteration_000/pretrain", [*FIRST[1:], *SECOND]),
        ("iteration_000/evaluate", ["0/evaluate"]),
        ("iteration_000/data", FIRST + SECOND),
    ],
)
def test_deleting_a_stages_folder_redoes_it_and_all_that_was_made_from_it(recipe, deleted, again):
    run_flywheel(recipe, command=fake)
    ran(recipe)
    shutil.rmtree(Path(recipe.run_dir) / deleted)
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == again  # none says "resumed": stale folders were discarded
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == []


@pytest.mark.parametrize(("fault", "status"), [(1, 1), (3, 1), (2, 2), ("no result", 1)])
def test_a_failed_stage_stops_the_chain_and_the_next_start_resumes_it(recipe, capfd, fault, status):
    faults(recipe, **{"0_sft": fault})
    assert run_flywheel(recipe, command=fake) == status
    assert ran(recipe) == FIRST[:5]
    errors = capfd.readouterr().err
    assert "iteration 0 sft failed" in errors and f"exit status {0 if fault == 'no result' else fault}" in errors
    assert RunFolder(Path(recipe.run_dir)).load_state().record(0, "sft").status == "failed"
    faults(recipe)
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == ["0/sft resumed", *FIRST[5:], *SECOND]
    assert RunFolder(Path(recipe.run_dir)).load_state().record(0, "sft").attempts == 2


def record(recipe: Recipe, stage: str):
    return RunFolder(Path(recipe.run_dir)).load_state().record(0, stage)


def test_a_finished_run_is_measured_by_lm_eval_when_it_is_asked_for_later(recipe, monkeypatch):
    assert run_flywheel(recipe, command=fake) == 0
    ran(recipe)
    monkeypatch.setattr(preflight, "require_installed", lambda recipe: None)
    asked = changed(recipe, evaluate=recipe.evaluate.model_copy(update={"lm_eval": LMEval(enabled=True)}))
    assert run_one_stage(asked, "evaluate", 1, command=fake) == 0
    assert ran(recipe) == ["1/evaluate"]
    result = RunFolder(Path(recipe.run_dir)).stage_dir(1, "evaluate") / "result.json"
    measured = json.loads(result.read_text())
    measured["metrics"]["lm_eval/chains/pass@1"] = 0.5
    result.write_text(json.dumps(measured))
    assert run_flywheel(asked, command=fake) == 0
    assert ran(recipe) == ["0/evaluate"]


def test_a_stage_that_crashes_is_started_again_where_the_recipe_says_so(recipe, capfd):
    recipe.flywheel.restarts = 2
    faults(recipe, **{"0_sft": [1, 3]})
    assert run_flywheel(changed(recipe, iterations=1), command=fake) == 0
    assert ran(recipe) == [*FIRST[:5], "0/sft resumed", "0/sft resumed", *FIRST[5:]]
    assert (record(recipe, "sft").status, record(recipe, "sft").attempts) == ("done", 3)
    errors = capfd.readouterr().err
    assert "iteration 0 sft: rank 0 ended with exit status 3; starting it again: it has no checkpoint yet" in errors


def test_restarts_are_counted_from_the_last_new_checkpoint(recipe, capfd):
    recipe.flywheel.restarts = 1
    faults(recipe, **{"0_sft": [{"save": 2, "exit": 1}, {"save": 4, "exit": 1}, 1, 1]})
    assert run_flywheel(changed(recipe, iterations=1), command=fake) == 1
    assert record(recipe, "sft").attempts == 4
    assert (record(recipe, "sft").status, record(recipe, "sft").step) == ("failed", 4)
    assert capfd.readouterr().err.count("starting it again: its last checkpoint is of step 4") == 2
    assert run_flywheel(changed(recipe, iterations=1), command=fake) == 0  # someone has seen to it


@pytest.mark.parametrize(("fault", "status"), [(2, 2), (65, 1), (74, 1)])
def test_what_another_start_would_not_help_is_not_started_again(recipe, fault, status):
    recipe.flywheel.restarts = 3
    faults(recipe, **{"0_sft": fault})
    assert run_flywheel(recipe, command=fake) == status
    assert record(recipe, "sft").attempts == 1


def test_a_stage_that_stopped_on_request_stops_the_chain_and_is_pending(recipe, capfd):
    faults(recipe, **{"0_sft": {"save": 3, "exit": 75}})
    assert run_flywheel(recipe, command=fake) == 75
    assert ran(recipe) == FIRST[:5] and record(recipe, "sft").status == "pending"
    assert "iteration 0 sft stopped on request at step 3; start it again to continue" in capfd.readouterr().err


def test_a_job_that_slurm_starts_again_and_again_without_a_checkpoint_is_given_up(recipe, capfd, monkeypatch):
    recipe.flywheel.restarts = 1
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    faults(recipe, **{"0_sft": [75, {"save": 3, "exit": 75}, 75, 75, None]})
    statuses = []
    for restart in range(6):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        statuses.append(run_flywheel(changed(recipe, iterations=1), command=fake))
    assert statuses == [75, 75, 75, 75, 1, 1]
    assert "sft failed: 2 starts in a row saved no new checkpoint (flywheel.restarts=1)" in capfd.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert run_flywheel(changed(recipe, iterations=1), command=fake) == 0


def test_an_interrupted_stage_begins_afresh_when_its_input_was_made_again(recipe):
    faults(recipe, **{"0_sft": 1})
    run_flywheel(recipe, command=fake)
    ran(recipe)
    faults(recipe)
    shutil.rmtree(Path(recipe.run_dir) / "iteration_000" / "anneal")
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == [*FIRST[2:], *SECOND]


def test_a_stage_that_ended_just_before_a_kill_is_not_run_again(recipe):
    run_flywheel(recipe, command=fake)
    ran(recipe)
    run = RunFolder(Path(recipe.run_dir))
    state = run.load_state()
    state.record(1, "evaluate").status = "running"
    run.save_state(state)
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == []
    assert run.load_state().record(1, "evaluate").status == "done"


def test_iterations_may_grow_and_shrink_and_the_layout_may_change(recipe):
    assert run_flywheel(changed(recipe, iterations=1), command=fake) == 0
    assert ran(recipe) == FIRST
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == SECOND
    other = changed(recipe, iterations=1)
    other.cluster.threads, other.tracking.log_interval, other.rl.micro_batch_size = 3, 1, 32
    assert run_flywheel(other, command=fake) == 0
    assert ran(recipe) == []


def test_another_recipes_run_folder_is_refused_with_the_keys_that_differ(recipe):
    run_flywheel(changed(recipe, iterations=1), command=fake)
    other = changed(recipe, seed=7)
    other.anneal.steps = 3
    with pytest.raises(UserError, match=r"another recipe.*seed: 1234 -> 7; anneal.steps: [0-9]+ -> 3"):
        run_flywheel(other, command=fake)
    (Path(recipe.run_dir) / "flywheel.yaml").unlink()
    with pytest.raises(UserError, match="another recipe"):
        run_flywheel(other, command=fake)


def test_a_damaged_input_checkpoint_is_refused_with_the_folder_to_delete(recipe):
    faults(recipe, **{"0_rl": 1})
    run_flywheel(recipe, command=fake)
    sft = Path(recipe.run_dir) / "iteration_000" / "sft"
    (sft / "checkpoints" / "step_00000001" / "weights.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=f"truncated.*delete {sft}"):
        run_flywheel(recipe, command=fake)


def test_a_replaced_outside_checkpoint_redoes_what_was_made_from_it(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_rmt.preflight.input_checks", lambda recipe, **_: [])
    recipe.pretrain.checkpoint = str(write_checkpoint(tmp_path / "outside", recipe.model.model_dump()))
    one = changed(recipe, iterations=1)
    assert run_flywheel(one, command=fake) == 0
    assert ran(recipe) == ["0/data", "0/anneal", "0/rmt", "0/sft", "0/rl", "0/evaluate"]
    shutil.rmtree(tmp_path / "outside")
    write_checkpoint(tmp_path / "outside", recipe.model.model_dump(), step=41)
    assert run_flywheel(one, command=fake) == 0
    assert ran(recipe) == ["0/anneal", "0/rmt", "0/sft", "0/rl", "0/evaluate"]


def test_several_nodes_are_refused_on_one_machine_but_not_by_a_dry_run(recipe):
    recipe.cluster.nodes = recipe.parallel.tensor = 2
    with pytest.raises(UserError, match="cluster.nodes=2, but this is one machine.*srun --ntasks-per-node=1"):
        run_flywheel(recipe, command=fake)
    assert not Path(recipe.run_dir).exists()
    assert run_flywheel(recipe, dry_run=True, command=fake) == 0


def test_one_stage_runs_alone_once_its_inputs_are_done(recipe):
    with pytest.raises(UserError, match="iteration 0 pretrain needs stages that are not done: iteration 0 data"):
        run_one_stage(recipe, "pretrain", 0, command=fake)
    assert run_one_stage(recipe, "data", 0, command=fake) == 0
    assert run_one_stage(recipe, "pretrain", 0, command=fake) == 0
    assert run_one_stage(recipe, "pretrain", 0, command=fake) == 0
    assert ran(recipe) == FIRST[:2]
    with pytest.raises(UserError, match="no stage pretrain in iteration 1"):
        run_one_stage(recipe, "pretrain", 1, command=fake)


def test_a_dry_run_prints_the_chain_and_the_changes_and_writes_nothing(recipe, capsys):
    recipe.rl.steps = 7
    assert run_flywheel(recipe, dry_run=True, command=fake) == 0
    out = capsys.readouterr().out
    assert "iteration 1 anneal (remit)" in out and "rl.steps: 40 -> 7" in out
    assert not Path(recipe.run_dir).exists()


def test_a_dry_run_says_what_would_run_again(recipe, capsys):
    assert run_flywheel(recipe, command=fake) == 0
    shutil.rmtree(Path(recipe.run_dir) / "iteration_001" / "sft")
    ran(recipe)
    capsys.readouterr()
    assert run_flywheel(recipe, dry_run=True, command=fake) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "iteration" in line]
    to_run = [row for row in rows if "to run" in row]
    assert len(to_run) == 3 and all("iteration 1" in row for row in to_run)
    assert ran(recipe) == []


def test_a_failing_report_is_told_and_counted(recipe, monkeypatch, caplog):
    monkeypatch.undo()

    def broken(path):
        raise RuntimeError("no figures today")

    module = type(sys)("nemo_rmt.report")
    module.write_report = broken
    monkeypatch.setitem(sys.modules, "nemo_rmt.report", module)
    assert run_flywheel(changed(recipe, iterations=1), command=fake) == 1
    assert "no figures today" in caplog.text and "nemo-rmt report" in caplog.text


STARTER = """
import signal
import sys
from pathlib import Path
# a shell starts background jobs with SIGINT ignored, nohup with SIGHUP, which the flywheel rightly leaves as it is
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, sys.argv[2])
from nemo_rmt import flywheel
from nemo_rmt.recipe_io import load_recipe
from fake_flywheel import fake
flywheel._write_report = lambda run: 0
sys.exit(flywheel.run_flywheel(load_recipe(None, [Path(sys.argv[1])], []), command=fake))
"""


@pytest.fixture
def hanging(recipe, tmp_path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A flywheel in a process of its own whose pretrain stage hangs, and that worker's pid."""

    faults(recipe, **{"0_pretrain": "hang"})
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe, comments=False))
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "recipe.yaml"), str(Path(__file__).parent)]
    )
    pid = Path(recipe.run_dir) / "worker.pid"
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline and starter.poll() is None
        time.sleep(0.05)
    yield starter, int(pid.read_text())
    starter.kill()  # the worker ends with it
    starter.wait()


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGKILL, -9)],
)
def test_the_worker_ends_with_the_flywheel_and_the_next_start_resumes(recipe, hanging, signum, status):
    starter, worker = hanging
    starter.send_signal(signum)
    assert starter.wait(15) == status
    assert gone(worker)
    status = RunFolder(Path(recipe.run_dir)).load_state().record(0, "pretrain").status
    assert status == ("running" if signum == signal.SIGKILL else "pending")
    ran(recipe)
    faults(recipe)
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == ["0/pretrain resumed", *FIRST[2:], *SECOND]


def test_a_killed_worker_is_a_failed_stage_with_its_signal(recipe, hanging):
    starter, worker = hanging
    os.kill(worker, signal.SIGKILL)
    assert starter.wait(15) == 1
    assert RunFolder(Path(recipe.run_dir)).load_state().record(0, "pretrain").status == "failed"
