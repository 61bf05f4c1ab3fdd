"""A chain as Slurm jobs: their scripts, the order they are submitted in, and that one of them runs."""

from __future__ import annotations

import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_recipe import small_recipe

pytest.importorskip("nemo_run")

import nemo_run as run
from nemo_command import nemo
from nemo_run.run.torchx_backend.schedulers import slurm as scheduler

from nemo_rmt.adapters.executors import fit_slurm, resolve_executor
from nemo_rmt.chain import plan_chain
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_io import load_recipe, resolved_yaml

SLURM = ["--executor", "slurm", "executor.account=lab", "executor.partition=gpu", "executor.time=02:00:00"]
NO_TEXT = "data.corpora=[{name: programs, kind: chains}]"
FAKES = {
    "sbatch": """echo "$*" >> submitted; echo $((100 + $(wc -l < submitted)))""",
    "sacct": """echo "JobID|JobName|State"; echo "${@: -1}|lab.job|PENDING" """,
    "scontrol": "echo localhost",
    # skips srun's own options, the first ones, and runs the rest
    "srun": """while [[ $1 == -* ]]; do [[ $1 == *=* ]] || shift; shift; done; exec "$@" """,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """Stand-ins for Slurm's commands; the file ``submitted`` gets a line per job. A pending job stays pending."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(scheduler, "SLURM_JOB_DIRS", str(tmp_path / "slurm_jobs"))
    return tmp_path / "submitted"


def scripts(output: str) -> dict[str, str]:
    """The printed sbatch scripts by job name."""
    parts = re.split(r"^# (\w+)_sbatch\.sh$", output, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(script: str) -> str:
    """What the script's last srun runs, with bash."""
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    return words[words.index("bash") + 2]


def test_a_dry_run_prints_one_script_per_stage_of_the_chain(capsys):
    words = ["iterations=2", "run_dir=my run", "cluster.gpus_per_node=2", "parallel.tensor=2", NO_TEXT]
    assert nemo("rmt", "flywheel", "--factory", "tiny", *words, *SLURM, "--dryrun") == 0
    printed = scripts(capsys.readouterr().out)
    chain = [planned.ref for planned in plan_chain(load_recipe("tiny", [], words))]
    assert list(printed) == [f"{ref.stage}_{ref.iteration}" for ref in chain] and len(printed) == 12
    flags = "account=lab gpus-per-node=2 nodes=1 ntasks-per-node=1 partition=gpu time=02:00:00 kill-on-invalid-dep=yes"
    start = f"cd {Path.cwd()} && {sys.executable} -m nemo_rmt"
    recipe = f"--yaml '{Path.cwd()}/my run/flywheel.yaml'"
    written = f"{sys.executable} -m nemo_rmt report '{Path.cwd()}/my run'"
    report = f' && {{ [ "${{SLURM_NODEID:-0}}" != 0 ] || {written}; }}'  # by the first node
    for ref, script in zip(chain, printed.values(), strict=True):
        for flag in flags.split():
            assert f"#SBATCH --{flag}\n" in script
        assert f"job-name=lab-lab.{ref.stage}_{ref.iteration}\n" in script
        assert "--container" not in script
        last = report if ref == chain[-1] else ""
        assert commands(script) == f"{start} stage {ref.stage} --iteration {ref.iteration} {recipe}{last}"
    assert list(Path().iterdir()) == []


def test_a_recipe_for_several_nodes_starts_one_nemo_rmt_on_each(capsys):
    words = ["stage", "data", "--factory", "tiny", NO_TEXT, "run_dir=/tmp/run", *SLURM, "cluster.nodes=2"]
    assert nemo("rmt", *words, "parallel.tensor=2", "--dryrun") == 0
    (script,) = scripts(capsys.readouterr().out).values()
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --ntasks-per-node=1\n" in script


def test_an_image_adds_container_flags_and_the_images_own_nemo_rmt(capsys):
    container = ["executor.container_image=nvcr.io/nvidia/nemo:25.11", "executor.container_mounts=['/data:/data']"]
    words = ["stage", "data", "--factory", "tiny", NO_TEXT, "run_dir=/tmp/run", *SLURM, *container, "--dryrun"]
    assert nemo("rmt", *words) == 0
    (script,) = scripts(capsys.readouterr().out).values()
    assert "--container-image nvcr.io/nvidia/nemo:25.11 " in script
    (mounts,) = re.findall(r"--container-mounts (\S+)", script)
    assert mounts.split(",")[:3] == ["/data:/data", f"{Path.cwd()}:{Path.cwd()}", "/tmp/run:/tmp/run"]
    run_it = "nemo-rmt stage data --iteration 0 --yaml /tmp/run/flywheel.yaml"
    assert commands(script) == f"cd {Path.cwd()} && {run_it}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--executor", "slurm"], "executor.account"),
        ([*SLURM, "executor.acount=a"], "did you mean 'executor.account'"),
        ([*SLURM, "executor.nodes=two"], "executor.nodes=two"),
        ([*SLURM, "executor.nodes=2"], "cluster.nodes=1"),
        ([*SLURM, "executor.gpus_per_node=4"], "cluster.gpus_per_node=1"),
        ([*SLURM, "executor.ntasks_per_node=8"], "executor.ntasks_per_node=8"),
        ([*SLURM, "executor.launcher=torchrun"], "executor.launcher=torchrun"),
        ([*SLURM, "anneal.stps=3"], "did you mean 'anneal.steps'"),
        ([*SLURM, "executor=local"], "one executor expected"),
        (["--executor", "nobody"], "unknown executor 'nobody'"),
        (["executor.account=a"], "--executor slurm"),
        (["--executor", "nemo_run.LocalExecutor"], "LocalExecutor"),
        (["--detach"], "--detach"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, words, named):
    assert nemo("rmt", "flywheel", "--factory", "tiny", NO_TEXT, *words, "-y") == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo-rmt: error: ") and error.count("\n") == 1 and named in error
    assert list(Path().iterdir()) == []


def test_an_executor_on_another_machine_is_refused():
    tunnel = run.SSHTunnel(host="login", user="me", job_dir="/jobs")
    with pytest.raises(UserError, match="executor.tunnel=SSHTunnel"):
        fit_slurm(run.SlurmExecutor(account="lab", tunnel=tunnel), load_recipe("tiny", [], []))


def test_executors_of_a_users_workspace_are_found_and_changed_by_settings():
    @run.cli.factory(target=run.SlurmExecutor)
    def lab() -> run.Config[run.SlurmExecutor]:
        return run.Config(run.SlurmExecutor, account="lab", env_vars={"A": "b"})

    executor = resolve_executor("lab", ["partition=long", "retries=3"])
    assert (executor.account, executor.partition, executor.retries) == ("lab", "long", 3)
    fitted = fit_slurm(executor, load_recipe("tiny", [], ["cluster.gpus_per_node=2", "parallel.tensor=2"]))
    assert (fitted.gpus_per_node, fitted.ntasks_per_node, fitted.env_vars) == (2, 1, {"A": "b"})
    assert fit_slurm(resolve_executor("lab", ["gres=gpu:2"]), load_recipe("tiny", [], [])).gpus_per_node is None
    assert executor.gpus_per_node is None


def test_the_machine_that_submits_needs_no_gpu(capsys):
    words = ["--factory", "tiny", NO_TEXT, "run_dir=run", "model.layers=transformer_engine", "--dryrun"]
    assert nemo("rmt", "stage", "data", *words) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert nemo("rmt", "stage", "data", *words, *SLURM) == 0


def test_what_sbatch_says_is_the_error(cluster, capfd, monkeypatch):
    Path("bin/sbatch").write_text("#!/bin/bash\necho 'invalid account' >&2; exit 1\n")
    words = ["rmt", "stage", "data", "--factory", "tiny", NO_TEXT, "run_dir=run", *SLURM, "-y"]
    assert nemo(*words) == 2
    assert re.search(r"^nemo-rmt: error: sbatch .* failed: invalid account$", capfd.readouterr().err, re.MULTILINE)
    monkeypatch.setenv("PATH", "")
    assert nemo(*words) == 2
    assert "sbatch is not on this machine" in capfd.readouterr().err


def test_each_job_waits_for_the_one_before_and_what_is_done_gets_no_job(cluster, capfd):
    recipe = small_recipe("nemo_run", iterations=2, anneal={"objective": "uniform"}, rmt={"enabled": False})
    Path("small.yaml").write_text(resolved_yaml(recipe, comments=False))
    words = ["rmt", "flywheel", "--yaml", "small.yaml", *SLURM, "executor.poll_estimated_start_time=False", "--detach"]
    assert nemo(*words, "-y") == 0
    lines = cluster.read_text().splitlines()
    names = [f"{planned.ref.stage}_{planned.ref.iteration}" for planned in plan_chain(recipe)]
    assert [Path(line.split()[-1]).name for line in lines] == [f"{name}_sbatch.sh" for name in names]
    waits = [re.findall(r"--dependency=(\S+)", line) for line in lines]
    assert waits == [[], *([f"afterok:{number}"] for number in range(101, 100 + len(lines)))]
    assert load_recipe(None, [Path("nemo_run/flywheel.yaml")], []) == recipe

    # nemo_run replaces /nemo_run in scripts, and the run folder has that name
    first = lines[0].split()[-1]
    job = subprocess.run(["bash", first], capture_output=True, text=True, cwd="/", timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    assert Path("nemo_run/iteration_000/data/result.json").is_file()

    cluster.unlink()
    assert nemo(*words, "-y") == 0
    lines = cluster.read_text().splitlines()
    assert [Path(line.split()[-1]).name for line in lines] == [f"{name}_sbatch.sh" for name in names[1:]]
    capfd.readouterr()
    assert nemo("rmt", "data", "build", "--yaml", "small.yaml", *SLURM, "-y") == 0
    assert "everything is done" in capfd.readouterr().out
    assert nemo("rmt", "evaluate", "--yaml", "small.yaml", *SLURM, "-y") == 2
    assert "needs stages that are not done" in capfd.readouterr().err
