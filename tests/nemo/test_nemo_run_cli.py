"""``nemo rmt``: the commands of nemo-rmt with nemo_run's options, prompt and factories."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_recipe import small_recipe

pytest.importorskip("nemo_run")

import fiddle as fdl
import nemo_run as run
from nemo_command import nemo

from nemo_rmt import cli, flywheel, recipes
from nemo_rmt.adapters import nemo_run_cli
from nemo_rmt.config import Recipe
from nemo_rmt.recipe_io import load_recipe, resolved_yaml

FAKE_STAGE = Path(__file__).parents[1] / "fake_stage.py"
NO_TEXT = "data.corpora=[{name: programs, kind: chains}]"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_stages(monkeypatch):
    """Commands start the stand-in for a stage."""

    def fake(stage_yaml: Path) -> list[str]:
        return [sys.executable, str(FAKE_STAGE), str(stage_yaml)]

    for function in (flywheel.run_flywheel, flywheel.run_one_stage):
        monkeypatch.setitem(function.__kwdefaults__, "command", fake)
    monkeypatch.setattr(flywheel, "_write_report", lambda run: 0)


def ran() -> list[str]:
    """The stages that the stand-in ran in the folder ``run``."""
    return Path("run/ran.txt").read_text().split()


def test_the_installed_entry_point_adds_every_command_of_nemo_rmt(capsys):
    # in a process of its own, because nemo_run passes over an entry point that cannot be imported
    program = "import sys; sys.argv = ['nemo', 'rmt', '--help']; from nemo_run.__main__ import app; app()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Couldn't load entrypoint rmt" not in done.stdout
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert "flywheel" in commands
    assert re.findall(r"^│ (\w+)  ", done.stdout, re.MULTILINE) == [*nemo_run_cli.STARTING, *nemo_run_cli.OTHERS]
    assert sorted(commands) == sorted([*nemo_run_cli.STARTING, *nemo_run_cli.OTHERS])


def test_the_entry_point_loads_nothing_heavy_where_there_is_no_nemo():
    # where there is, nemo_run loads it for each of its commands anyway
    program = (
        "import sys, nemo_run; import importlib.util as util; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name == 'nemo' else find(name, *rest); "
        "before = set(sys.modules); import nemo_rmt.adapters.nemo_run_cli; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert "nemo_rmt" in loaded, done.stderr
    assert not loaded & {"torch", "megatron", "nemo", "matplotlib", "transformers", "tokenizers"}


def test_a_dry_run_prints_what_nemo_rmt_prints(capsys):
    Path("part.yaml").write_text("sft: {steps: 5}")
    Path("more.yaml").write_text("sft: {steps: 6}\nrl: {steps: 7}")
    words = ["run_dir=run", "iterations=3", "rmt.grpo.samples_per_group=16", "anneal.optim.lr*=0.5", NO_TEXT]
    files = ["--yaml", "part.yaml", "--yaml", "more.yaml"]
    assert cli.main(["flywheel", "tiny", *words, *files, "--dry-run"]) == 0
    expected = capsys.readouterr().out
    assert "sft.steps: 16 -> 6" in expected and "anneal.optim.lr: 0.002 -> 0.001" in expected
    assert nemo("rmt", "flywheel", "--factory", "tiny", *words, *files, "--dryrun") == 0
    assert capsys.readouterr().out == expected
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["flywheel", "anneal.remti.epsilon=1", "-y"], "did you mean 'anneal.remit.epsilon'?"),
        (["flywheel", "iterations=many", "-y"], 'iterations="many"'),
        (["flywheel", "--fast", "-y"], "unknown option --fast"),
        (["flywheel", "data.corpora.0={name: a, kind: jsonl, path: /not/there}", "-y"], "/not/there"),
        (["stage", "polish", "-y"], "no stage polish"),
        (["stage", "rl", "--iteration", "1", NO_TEXT, "-y"], "iteration 1 sft"),
        (["data", "-y"], "data takes build"),
        (["evaluate", "--iteration", "9", "-y"], "iteration 9"),
        (["recipes", "drop"], "list or show"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2_as_in_nemo_rmt(capsys, words, named):
    assert nemo("rmt", words[0], "--factory", "tiny", *words[1:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo-rmt: error: ") and error.count("\n") == 1 and named in error
    assert cli.main([*(word for word in words if word != "-y"), "tiny"]) == 2
    assert capsys.readouterr().err == error
    assert not list(Path().rglob("state.json"))


def test_without_y_it_shows_the_chain_and_asks_and_n_starts_nothing(capsys, fake_stages):
    words = ["rmt", "flywheel", "--factory", "tiny", f"run_dir={Path.cwd()}/run", "iterations=1", NO_TEXT]
    assert nemo(*words, answer="n\n") == 0
    shown = capsys.readouterr().out
    assert "iteration 0 evaluate" in shown and "iterations: 2 -> 1" in shown and "Continue?" in shown
    assert not Path("run").exists()
    assert nemo(*words, answer="") == 1  # nobody there to answer
    assert not Path("run").exists()
    assert nemo(*words, answer="y\n") == 0
    assert [stage.split("/")[1] for stage in ran()] == ["data", "pretrain", "anneal", "rmt", "sft", "rl", "evaluate"]


def test_single_stages_ask_too_and_run_as_in_nemo_rmt(capfd, fake_stages):
    recipe = ["--factory", "tiny", f"run_dir={Path.cwd()}/run", NO_TEXT]
    assert nemo("rmt", "data", "build", *recipe, "--dryrun") == 0
    assert f"iteration 0 data of tiny in {Path.cwd()}/run" in capfd.readouterr().out
    assert nemo("rmt", "data", "build", *recipe, answer="n\n") == 0
    assert "Continue?" in capfd.readouterr().out and not Path("run").exists()
    assert nemo("rmt", "data", "build", *recipe, "-y") == 0
    assert nemo("rmt", "stage", "pretrain", *recipe, "--iteration", "0", "-y") == 0
    assert ran() == ["0/data", "0/pretrain"]
    saved = "run/iteration_000/pretrain/stage.yaml"
    assert nemo("rmt", "stage", saved, "--dryrun") == 0
    assert nemo("rmt", "stage", saved, "--executor", "slurm", "executor.account=a", "-y") == 2
    assert "runs on this machine" in capfd.readouterr().err


def test_a_failed_stage_is_exit_code_1(fake_stages):
    Path("run").mkdir()
    Path("run/plan.json").write_text('{"0/data": 3}')
    assert nemo("rmt", "flywheel", "--factory", "tiny", "run_dir=run", NO_TEXT, "-y") == 1


def test_to_yaml_writes_the_resolved_recipe_which_loads_again(capsys):
    assert nemo("rmt", "flywheel", "--factory", "tiny", "seed=9", "run_dir=run", "--to-yaml", "out.yaml") == 0
    assert capsys.readouterr().out.split() == ["out.yaml"]
    assert load_recipe(None, [Path("out.yaml")], []) == load_recipe("tiny", [], ["seed=9", "run_dir=run"])
    assert not Path("run").exists()


def test_recipes_are_factories_for_python(fake_stages):
    for name in recipes.names():
        assert fdl.build(run.cli.resolve_factory(Recipe, name)()) == recipes.build(name)
    task = run.cli.resolve_factory(nemo_run_cli.flywheel, "tiny")()
    with pytest.raises(AttributeError, match="stps"):
        task.recipe.anneal.stps = 5
    task.recipe.run_dir, task.recipe.iterations, task.recipe.anneal.steps = f"{Path.cwd()}/run", 1, 7
    task.recipe.data.corpora = [corpus for corpus in task.recipe.data.corpora if corpus.name == "programs"]
    run.run(task, direct=True)
    assert ran()[-1] == "0/evaluate"
    assert load_recipe(None, [Path("run/flywheel.yaml")], []).anneal.steps == 7
    Path("run/plan.json").write_text('{"0/evaluate": 3}')
    Path("run/iteration_000/evaluate/result.json").unlink()
    with pytest.raises(RuntimeError, match="status 1"):
        run.run(task, direct=True)


def test_nemo_runs_own_parser_reads_our_recipes_as_arguments_of_other_functions():
    def train(recipe): ...

    train.__annotations__["recipe"] = Recipe  # nemo_run does not look up annotations that are text
    words = ["recipe=tiny", "recipe.rmt.grpo.samples_per_group=16", "recipe.anneal.optim.lr*=0.5"]
    recipe = fdl.build(run.cli.parse_partial(train, *words)).keywords["recipe"]
    assert (recipe.rmt.grpo.samples_per_group, recipe.anneal.optim.lr) == (16, 1e-3)


@pytest.mark.slow
def test_y_runs_the_real_stages_to_the_end():
    recipe = small_recipe("run", iterations=1, **{name: {"enabled": False} for name in ("anneal", "rmt", "rl")})
    Path("small.yaml").write_text(resolved_yaml(recipe, comments=False))
    assert nemo("rmt", "flywheel", "--yaml", "small.yaml", "sft.steps=2", "-y") == 0
    (stages,) = json.loads(Path("run/state.json").read_text())["iterations"]
    assert {name: record["status"] for name, record in stages.items()} == {
        "data": "done",
        "pretrain": "done",
        "sft": "done",
        "evaluate": "done",
    }
    assert len(Path("run/iteration_000/sft/metrics.jsonl").read_text().splitlines()) == 2
    assert os.path.getsize("run/report/index.html") > 10_000
