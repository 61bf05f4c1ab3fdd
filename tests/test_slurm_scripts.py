"""The scripts in slurm/, with stand-ins for Slurm's commands and for nemo-rmt: what they start, and how they end.

tests/slurm has the same on a real Slurm.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_slurm import SLURM, Site

SCRIPTS = sorted(SLURM.glob("*.sh"))
BATCH = [path for path in SCRIPTS if path.name not in ("launch.sh", "flywheel_14b.sh", "experiment.sh")]


@pytest.fixture
def site(tmp_path) -> Site:
    return Site.at(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", script.name], cwd=SLURM, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_batch_scripts_ask_for_the_same_but_for_their_names():
    def asked(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if re.match("#SBATCH (?!--job-name)", line)]

    assert len(BATCH) == 5
    assert all(asked(path) == asked(BATCH[0]) for path in BATCH)


def test_a_script_that_does_not_find_the_launcher_says_what_to_set(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("NEMO_RMT_HOME", "SLURM_SUBMIT_DIR")}
    command = ["bash", str(SLURM / "rmt_14b.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "set NEMO_RMT_HOME" in done.stderr


def test_a_job_makes_the_data_first_and_runs_its_stages_on_all_nodes_in_order(site):
    code, log = site.job(
        "posttrain", "sft.steps=3", ITERATION="1", OVERRIDES="seed=4 rl.steps=2", SLURM_GPUS_ON_NODE="4"
    )
    assert code == 0
    recipe = f"tiny seed=4 rl.steps=2 sft.steps=3 run_dir={site.work}/run cluster.nodes=2 cluster.gpus_per_node=4"
    assert site.lines("calls", "nemo-rmt plan")[-1] == f"nemo-rmt plan {recipe}"
    assert [line for line in site.lines("calls") if line.startswith("nemo-rmt stage")] == [
        f"nemo-rmt stage data {recipe} --iteration 0 MASTER_ADDR=10.0.0.1",
        f"nemo-rmt stage sft {recipe} --iteration 1 MASTER_ADDR=10.0.0.1",
        f"nemo-rmt stage rl {recipe} --iteration 1 MASTER_ADDR=10.0.0.1",
    ]
    assert all(
        "--nodes=2 --ntasks=2 --ntasks-per-node=1" in line for line in site.lines("calls", "srun") if "stage" in line
    )
    assert log[0].startswith("nemo-rmt job 7: start 1: sft rl of tiny, iteration 1, on 2 node(s) n[1-2]")
    assert log[-1] == "nemo-rmt job 7: ended with exit code 0: done"


@pytest.mark.parametrize(
    ("given", "processes"),
    [
        ({"SLURM_GPUS_PER_NODE": "h100:2", "SLURM_GPUS_ON_NODE": "8"}, 2),  # of a whole node
        ({"SLURM_GPUS_PER_NODE": "0", "SLURM_GPUS_ON_NODE": "8"}, 8),  # through --gres
        ({"SLURM_GPUS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "GPUS_PER_NODE": "4"}, 4),
        ({}, 1),
    ],
)
def test_a_node_has_a_process_for_each_gpu_asked_for(site, given, processes):
    assert site.job("anneal", **given)[0] == 0
    assert f" cluster.gpus_per_node={processes}" in site.lines("calls", "nemo-rmt plan")[-1]


def test_a_job_runs_only_what_is_not_done_and_evaluation_writes_the_report(site):
    site.status(_0="data sft evaluate")
    assert site.job("posttrain")[0] == 0
    assert [line.split()[2] for line in site.lines("calls") if line.startswith("nemo-rmt stage")] == ["rl"]
    assert not site.lines("calls", "nemo-rmt report")
    assert site.job("evaluate")[0] == 0
    assert len(site.lines("calls", "nemo-rmt stage")) == 2  # srun's and its own line of rl
    assert site.lines("calls")[-1].startswith("nemo-rmt report tiny")


def test_pre_training_is_iteration_0s_and_a_missing_stage_is_wrong_input(site):
    assert site.job("pretrain", ITERATION="1")[0] == 0
    assert "--iteration 0" in site.lines("calls", "stage pretrain")[0]
    code, log = site.job("rmt", ITERATION="5")
    assert code == 2
    assert log[-1].endswith("the recipe has no such stage in iteration 5: rmt")


def test_a_plan_that_does_not_fit_ends_the_job_and_is_made_once_a_job(site):
    site.write(plan="2")
    assert site.job("rmt")[0] == 2
    assert not site.lines("calls", "nemo-rmt stage")
    assert site.job("rmt", SLURM_RESTART_COUNT="1")[0] == 0


@pytest.mark.parametrize(("status", "words"), [(1, "rank 1 was killed"), (2, "no such corpus")])
def test_a_failed_stage_ends_the_job_with_its_exit_code_and_its_reason_last(site, status, words):
    site.write(stage=f"echo 'nemo-rmt: {words}' >&2; echo more; exit {status}")
    code, log = site.job("rmt")
    assert code == status
    assert log[-1] == f"nemo-rmt job 7: ended with exit code {status}: {words}"
    assert not site.lines("calls", "requeue")


@pytest.mark.parametrize(
    ("status", "words"), [(75, "stopped at a checkpoint; requeued"), (137, "killed (srun's exit code")]
)
def test_a_stage_that_stopped_or_was_killed_puts_the_job_back_into_the_queue(site, status, words):
    site.write(stage=f"exit {status}")
    code, log = site.job("rmt")
    assert code == 75
    assert words in log[-1]
    assert site.lines("calls", "requeue") == ["scontrol requeue 7"]


def test_a_job_that_slurm_is_ending_is_not_requeued(site):
    site.write(stage="exit 75", job_state="COMPLETING")
    code, log = site.job("rmt")
    assert code == 75
    assert "Slurm ends the job (COMPLETING)" in log[-1]
    assert not site.lines("calls", "requeue")


def test_a_job_whose_tasks_keep_getting_killed_ends_at_last(site):
    site.write(stage="kill -KILL $$")
    assert site.job("rmt", SLURM_RESTART_COUNT="30")[0] == 1
    assert not site.lines("calls", "requeue")


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_reaches_the_stage_as_usr1_and_the_job_waits_for_its_checkpoint(site, sent):
    site.write(
        stage='trap \'sleep 1; touch "$WORK/saved"; exit 75\' USR1; touch "$WORK/up"; while :; do sleep 0.1; done'
    )
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    command = ["bash", str(SLURM / "rmt_14b.sh")]
    with subprocess.Popen(command, env=site.environment(**allocation), stdout=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 20
        while not (site.work / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(sent)
        assert job.wait(20) == 75
    assert (site.work / "saved").exists()
    assert site.lines("calls", "requeue") == ["scontrol requeue 7"]


def test_a_stage_that_the_signal_kills_before_it_takes_requests_is_requeued_without_limit(site):
    site.write(stage='kill -USR1 "$PARENT"; sleep 1; kill -USR1 $$')
    script = (site.work / "venv" / "bin" / "srun").read_text().replace("exec", "export PARENT=$PPID; exec")
    (site.work / "venv" / "bin" / "srun").write_text(script)
    site.status(_0="data")
    code, log = site.job("rmt", SLURM_RESTART_COUNT="30")
    assert code == 75
    assert "rmt stopped by USR1" in log[-1]
    assert site.lines("calls", "requeue") == ["scontrol requeue 7"]


@pytest.mark.parametrize(
    ("words", "values", "message"),
    [
        ((), {"GPUS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}, "GPUS_PER_NODE=8, but the job has 4 GPU(s)"),
        ((), {"GPUS_PER_NODE": "many"}, "GPUS_PER_NODE=many"),
        ((), {"CONTAINER_IMAGE": "image.sqsh"}, "needs the pyxis plugin"),
        ((), {"VENV": "/does/not/exist"}, "VENV=/does/not/exist has no bin/nemo-rmt"),
        (("cluster.nodes=3",), {}, "cluster.nodes=3 is what Slurm gives the job"),
    ],
)
def test_wrong_settings_end_a_job_before_anything_starts(site, words, values, message):
    code, log = site.job("rmt", *words, **values)
    assert code == 2
    assert message in log[-1]
    assert not site.lines("calls")


def test_in_a_container_everything_runs_there_with_the_working_and_the_run_folder_mounted(site):
    site.write(srun_help="  --container-image=[USER@][REGISTRY#]IMAGE")
    assert site.job("rmt", CONTAINER_IMAGE="image.sqsh", VENV="/does/not/exist")[0] == 0
    calls = [line for line in site.lines("calls") if line.startswith("srun ")]
    here, run = Path.cwd(), site.work / "run"
    assert len(calls) == 4  # plan, status, data, rmt
    for line in calls:
        assert f"--container-image=image.sqsh --container-mounts={here}:{here},{run}:{run}" in line


def test_a_flywheel_is_a_chain_of_jobs_each_after_the_success_of_the_one_before(site):
    done = site.flywheel("rl.steps=3", NODES="4", GPUS_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    submitted = site.lines("submitted")
    assert [line.split("/")[-1] for line in submitted[:5]] == [
        f"{name}_14b.sh rl.steps=3" for name in ("pretrain", "anneal", "rmt", "posttrain", "evaluate")
    ]
    assert len(submitted) == 9
    for number, line in enumerate(submitted):
        assert f"iteration={number // 5 if number < 5 else 1} --parsable --nodes=4 " in line
        assert ("--dependency" in line) == (number > 0) and "--kill-on-invalid-dep=yes" in line
        assert number == 0 or f"--dependency=afterok:{100 + number} " in line
    assert re.search(r"iteration 1 evaluate +109 +108 +submitted", done.stdout)
    assert [line.split("\t")[:3] for line in site.lines("run/slurm_jobs.tsv")][-1] == ["1", "evaluate", "109"]
    assert "cluster.nodes=4 cluster.gpus_per_node=1" in site.lines("calls", "nemo-rmt plan")[0]


def test_a_second_start_submits_what_is_neither_done_nor_queued(site):
    site.flywheel()
    site.status(_0="data pretrain anneal sft")
    site.write(submitted="", queue="103 RUNNING None\n104 PENDING Dependency\n99 PENDING Priority")
    done = site.flywheel()
    assert done.returncode == 0, done.stderr
    assert re.search(r"iteration 0 anneal +- +- +done", done.stdout)
    assert re.search(r"iteration 0 posttrain +104 +103 +PENDING", done.stdout)
    first = site.lines("submitted", "iteration")[0]
    assert "evaluate_14b.sh" in first and "--dependency=afterok:104 " in first
    assert len(site.lines("submitted", "iteration")) == 5


def test_jobs_that_slurm_is_about_to_cancel_are_submitted_again(site):
    site.flywheel()
    site.status(_0="data pretrain")
    site.write(submitted="", queue="103 PENDING DependencyNeverSatisfied")
    assert site.flywheel().returncode == 0
    assert len(site.lines("submitted", "iteration")) == 8


def test_a_queued_job_whose_predecessor_is_gone_is_for_the_user_to_cancel(site):
    site.flywheel()
    site.write(submitted="", queue="104 PENDING JobHeldUser")
    done = site.flywheel()
    assert done.returncode == 2
    assert "scancel 104" in done.stderr
    assert not site.lines("submitted", "iteration")


def test_nothing_is_submitted_when_slurm_or_the_plan_refuses_a_job(site):
    site.write(refused="evaluate_14b.sh")
    done = site.flywheel()
    assert done.returncode == 2 and "invalid partition" in done.stderr
    site.write(refused="nothing is", plan="2")
    assert site.flywheel().returncode == 2
    assert not (site.work / "submitted").exists() and not (site.work / "run").exists()


def test_a_recipe_without_some_stages_has_no_jobs_for_them(site):
    site.write(status="0\tdata\tpending\n0\trmt\tpending\n0\tevaluate\tpending")
    assert site.flywheel().returncode == 0
    assert [line.split("/")[-1].split()[0] for line in site.lines("submitted")] == ["rmt_14b.sh", "evaluate_14b.sh"]


def test_every_task_of_an_array_works_on_the_same_experiment(site):
    code, log = site.experiment("remit_vs_baselines", "--jobs", "2", "anneal.steps=3")
    assert code == 0
    words = "nemo-rmt experiment remit_vs_baselines --jobs 2 anneal.steps=3"
    assert site.lines("calls") == [f"srun --nodes=1 --ntasks=1 --cpu-bind=none {words}", words]
    assert log[0].startswith("nemo-rmt job 8: start 1: experiment remit_vs_baselines, on n1")
    assert log[-1] == "nemo-rmt job 8: ended with exit code 0: done"


@pytest.mark.parametrize(
    ("status", "code", "words", "requeued"),
    [
        (75, 75, "stopped at a checkpoint; requeued", True),
        (137, 75, "nemo-rmt was killed (srun's exit code is 137); requeued", True),
        (1, 1, "ended with exit code 1: not done: uniform with seed 1", False),
        (2, 2, "ended with exit code 2: not done", False),
    ],
)
def test_a_task_of_an_experiment_ends_as_its_worker_did_or_is_requeued(site, status, code, words, requeued):
    site.write(stage=f"echo 'nemo-rmt: not done: uniform with seed 1' >&2; exit {status}")
    found, log = site.experiment("smoke")
    assert found == code
    assert words in log[-1]
    assert (site.lines("calls", "requeue") == ["scontrol requeue 8"]) == requeued


def test_an_experiments_script_without_a_name_is_wrong_input(site):
    code, log = site.experiment()
    assert code == 2 and "name an experiment" in log[-1]
    assert not site.lines("calls")
