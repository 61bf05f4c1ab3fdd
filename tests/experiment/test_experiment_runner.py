"""Experiments with fake stages: what is shared, resumed, given up and left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_experiment import kinds, ran, start, write_experiment, write_measured

from nemo_rmt.errors import UserError
from nemo_rmt.experiment import run
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.report import write_report
from nemo_rmt.run_folder import RunFolder
from nemo_rmt.status import recipe_of_run, stage_statuses

LIMIT_S = 120
# of one seed: uniform's second anneal is its first, from which remit's and sharp's first iterations come too
ONE_SEED = {"anneal": 3, "data": 1, "evaluate": 4, "pretrain": 1, "rl": 4}


@pytest.fixture(autouse=True)
def results(monkeypatch):
    """What is made of the measurements is another file's subject."""
    monkeypatch.setattr(run.Results, "write", write_measured)


@pytest.fixture
def experiment(tmp_path) -> Path:
    return write_experiment(tmp_path / "anneals.yaml")


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def faults(out: Path, **plan: object) -> None:
    (out / "plan.json").write_text(json.dumps(plan))


def table(out: Path) -> list[dict]:
    return json.loads((out / "anneals" / "measured.json").read_text())


def worker(experiment: Path, out: Path, jobs: int = 2) -> subprocess.Popen:
    """A worker as a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("fake_experiment.py")),
        str(experiment),
        str(out),
        str(jobs),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hanging(out: Path, stage: str, process: subprocess.Popen) -> Path:
    """The file with the process id of a stage that hangs, once it does."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := list(out.glob(f"stages/{stage}-*/begun"))) or not found[0].read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return found[0]


def test_every_stage_is_computed_once_whatever_arms_need_it(experiment, out, capfd):
    assert start(experiment, out, jobs=2, seeds=[1, 2]) == 0
    names = ran(out)
    assert len(names) == len(set(names))
    assert kinds(names) == {stage: 2 * count for stage, count in ONE_SEED.items()}
    printed = capfd.readouterr().out
    assert "seed 1, uniform and 2 more: iteration 0 pretrain: started" in printed
    assert "26 of 26 stages" in printed
    assert start(experiment, out, seeds=[1, 2]) == 0
    assert ran(out) == []


def test_another_experiment_of_the_same_folder_shares_what_they_have_in_common(experiment, out, tmp_path):
    assert start(experiment, out) == 0
    ran(out)
    arms = {"low": {"about": "", "settings": {"anneal": {"remit": {"epsilon": 0.1}}}}}
    other = write_experiment(tmp_path / "others.yaml", arms=arms, control="low")
    assert start(other, out) == 0
    assert kinds(ran(out)) == {"anneal": 1, "evaluate": 1, "rl": 1}


def test_keys_that_do_not_decide_results_share_all_stages_and_those_that_do_share_none(experiment, out, tmp_path):
    chosen = {"arms": ["uniform"]}
    assert start(experiment, out, **chosen) == 0
    before = set(ran(out))
    words = ["cluster.threads=3", "anneal.checkpoint_interval=7", "tracking.log_interval=1"]
    assert start(experiment, out, overrides=words, **chosen) == 0
    assert ran(out) == []
    wider = write_experiment(tmp_path / "wider.yaml")
    assert start(wider, out, overrides=["model.ffn_hidden_size=64"], **chosen) == 0
    assert len(before & {*(after := ran(out))}) == 0 and len(after) == len(before) - 1  # data has no model


def test_an_arms_folder_is_a_run_folder(experiment, out):
    assert start(experiment, out) == 0
    moved = out.with_name("moved")
    shutil.move(out, moved)  # everything in it is relative
    folder = moved / "anneals" / "remit" / "seed_1"
    recipe = recipe_of_run(folder)
    assert {each.status for each in stage_statuses(recipe)} == {"done"}
    record = RunFolder(folder).load_state().record(1, "rl")
    result = RunFolder(folder).result(1, "rl")
    assert inspect_checkpoint(folder / result["checkpoint"]).stage == "rl"
    assert record.checkpoint == result["checkpoint"] and record.attempts == 1
    assert RunFolder(folder).stage_dir(1, "rl").resolve().name == f"rl-{record.id}"
    assert "remit" in write_report(folder).read_text()


def test_an_arms_figures_are_those_of_its_evaluations(experiment, out):
    assert start(experiment, out, seeds=[2], arms=["uniform"]) == 0
    (found,) = table(out)
    run_folder = RunFolder(out / "anneals" / "uniform" / "seed_2")
    for iteration in (0, 1):
        result = run_folder.result(iteration, "evaluate")["metrics"]
        assert found["metrics"][f"iteration_{iteration}/lm/all/nll"] == result["lm/all/nll"]
    steps = recipe_of_run(run_folder.path).anneal.steps
    assert found["curves"] == {
        "lm/all/nll": {"5": result["anneal@5/lm/all/nll"], str(steps): result["anneal/lm/all/nll"]}
    }


def test_a_failed_stage_gives_up_its_arms_alone_and_the_next_start_tries_it_again(experiment, out, capfd):
    faults(out, rl="fail")
    assert start(experiment, out) == 1
    assert kinds(ran(out)) == {"anneal": 1, "data": 1, "pretrain": 1, "rl": 2}
    printed = capfd.readouterr().err
    log = next((out / "stages").glob("rl-*")) / "log" / "output.log"
    assert log.read_text() == "nemo-rmt: no such luck\n"
    assert (
        "seed 1, uniform and 2 more: iteration 0 rl: exit status 1; see " in printed and str(log.parents[2]) in printed
    )
    assert "not done: uniform with seed 1, remit with seed 1, sharp with seed 1" in printed
    faults(out)
    assert start(experiment, out) == 0
    assert kinds(ran(out)) == {"anneal": 2, "evaluate": 4, "rl": 4}


def test_killed_in_the_middle_the_next_start_ends_with_the_same_table(experiment, out):
    undisturbed = out.with_name("undisturbed")
    undisturbed.mkdir()
    assert start(experiment, undisturbed, jobs=2) == 0
    faults(out, rl="hang")
    with worker(experiment, out, jobs=1) as process:
        begun = hanging(out, "rl", process)
        stage = psutil.Process(int(begun.read_text()))
        process.kill()
    psutil.wait_procs([stage], timeout=LIMIT_S)
    assert not stage.is_running()  # it ended with its worker
    faults(out)
    assert start(experiment, out, jobs=2) == 0
    assert json.dumps(table(out), sort_keys=True) == json.dumps(table(undisturbed), sort_keys=True)
    again = [name for name in ran(out) if name == begun.parent.name]
    assert len(again) == 2


def test_workers_that_know_nothing_of_each_other_never_do_a_stage_twice(experiment, out):
    faults(out, rl=0.2)
    workers = [worker(experiment, out, jobs) for jobs in (1, 2, 2)]
    for process in workers:
        printed, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, printed + errors
    names = ran(out)
    assert len(names) == len(set(names)) == 13
    assert len(table(out)) == 3


def test_a_worker_waits_for_a_stage_that_another_one_has(experiment, out):
    faults(out, pretrain="hang")
    first = worker(experiment, out)
    begun = hanging(out, "pretrain", first)
    second, held = worker(experiment, out), begun.parent.name
    time.sleep(1.0)  # in which it does not give up, nor take it
    assert second.poll() is None and ran(out).count(held) == 1
    first.kill()
    printed, errors = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 0, printed + errors
    first.communicate()
    assert held in ran(out)


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda each: str(each)
)
def test_a_signal_ends_the_stages_too_and_nothing_is_lost(experiment, out, sent, status):
    faults(out, pretrain="hang")
    with worker(experiment, out) as process:
        begun = hanging(out, "pretrain", process)
        process.send_signal(sent)
        assert process.wait(LIMIT_S) == status
    assert not psutil.pid_exists(int(begun.read_text()))
    record = RunFolder(out / "anneals" / "remit" / "seed_1").load_state().record(0, "pretrain")
    assert record.status == "pending"


def test_a_changed_recipe_is_refused_where_the_results_are_of_another(experiment, out):
    assert start(experiment, out, arms=["uniform"]) == 0
    with pytest.raises(UserError, match="anneals/uniform/seed_1 is of another recipe.*anneal.steps: .* -> 3.*--out"):
        start(experiment, out, arms=["uniform"], overrides=["anneal.steps=3"])


def test_a_dry_run_lists_every_stage_with_its_arms_and_starts_nothing(experiment, out, capsys):
    assert start(experiment, out, dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "0 of 13 stages are done" in printed and "uniform, remit, sharp" in printed
    assert not list(out.iterdir())


def test_it_runs_what_is_chosen_with_the_control(experiment, out):
    assert start(experiment, out, seeds=[5], arms=["sharp"]) == 0
    assert [(each["arm"], each["seed"]) for each in table(out)] == [("uniform", 5), ("sharp", 5)]


def test_stage_processes_inherit_the_lock_of_their_stage(experiment, out):
    """Otherwise a killed worker's ranks could still write where the next one has begun."""
    faults(out, data="hang")
    with worker(experiment, out) as process:
        begun = hanging(out, "data", process)
        files = [os.readlink(link) for link in Path(f"/proc/{begun.read_text()}/fd").iterdir()]
        process.kill()
    assert str(begun.with_name(".lock").resolve()) in files
