"""Experiments' files: what they may say, and what the arms' recipes are."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_experiment import BASE, write_experiment

from nemo_rmt import cli
from nemo_rmt.errors import UserError
from nemo_rmt.experiment import ExperimentOptions, list_experiments, run_experiment
from nemo_rmt.experiment.config import arm_recipe, experiments_folder, load_experiment

ARM = {"about": "", "settings": {}}
HALVED = {stage: {"micro_batch_size": 4} for stage in ("pretrain", "anneal", "sft")}
NTP = {"rmt": {"enabled": True, "objective": "ntp", "corpora": []}}


def run(path: Path, **options) -> int:
    settings = ExperimentOptions(overrides=options.pop("overrides", []), out=path.parent / "out", **options)
    return run_experiment(str(path), settings, command=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contro": "uniform"}, "unknown key 'contro': did you mean 'control'"),
        ({"arms": {"uniform": {**ARM, "setings": {}}}}, "unknown key 'arms.uniform.setings': did you mean 'settings'"),
        ({"control": "ntp"}, "control=ntp is none of the arms: uniform, remit, sharp"),
        ({"seeds": [1, 2, 1]}, "seeds has 1 twice"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        (
            {"metrics": [{"name": "lm/all/nll", "label": "", "higher_is_better": False}]},
            "metrics.0.name: String should",
        ),
        ({"arms": {"uniform": {**ARM, "equal_flops": "remit"}}}, "uniform.equal_flops=remit is none of the arms"),
        ({"arms": {"uniform": {**ARM, "equal_flops": "uniform"}}}, "leads back to itself: uniform -> uniform"),
        ({"arms": {"../uniform": ARM}, "control": "../uniform"}, "String should match pattern"),
        ({"arms": {"uniform": {"settings": {}}}}, "arms.uniform.about is required"),
        ({"settings": {"seed": 3}}, "settings.seed: an experiment's seed comes from seeds"),
        ({"recipe": "tinny"}, "unknown recipe 'tinny': did you mean tiny"),
        (
            {"arms": {"uniform": {**ARM, "settings": {"anneal": {"epsilon": 1}}}}},
            "arm uniform: unknown key 'anneal.eps",
        ),
        (
            {"arms": {"uniform": {**ARM, "settings": {"model": {"hidden_size": 7}}}}},
            "arm uniform: model: hidden_size 7",
        ),
        ({"settings": {"data": {"corpora": []}, "rmt": {"corpora": []}}}, "arm uniform: data.corpora is empty"),
        ({"settings": {"cluster": {"nodes": 2}, **HALVED}}, "arm uniform: cluster.nodes=2"),
        (
            {
                "arms": {
                    "uniform": ARM,
                    "x": {**ARM, "settings": {"anneal": {"enabled": False}}, "equal_flops": "uniform"},
                }
            },
            "arm x: equal_flops is reached with steps of the anneal, and anneal.enabled=false",
        ),
        (
            {"arms": {"uniform": ARM, "x": {**ARM, "settings": NTP, "equal_flops": "uniform"}}},
            "arm x: with rmt.objective=ntp equal_flops must be an arm with rmt.objective=rmt",
        ),
        ({"settings": {"pretrain": {"checkpoint": "/nowhere"}}}, "/nowhere is neither a checkpoint nor a cache"),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_starts(tmp_path, changes, message):
    path = write_experiment(tmp_path / "wrong.yaml", **changes)
    with pytest.raises(UserError) as error:
        run(path)
    assert message in str(error.value) and "wrong" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["remit", "rho1"]}, "--arms: 'rho1' is none of the experiment's arms"),
        ({"control": "rho1"}, "--control: 'rho1' is none of the experiment's arms"),
        ({"seeds": [3, 3]}, "--seeds: seeds has 3 twice"),
        ({"jobs": 0}, "--jobs=0 must be at least 1"),
        ({"overrides": ["seed=3"]}, "seed=3: an experiment's seed comes from seeds"),
        ({"overrides": ["run_dir=x"]}, "run_dir=x: an experiment's run_dir comes from --out"),
        ({"overrides": ["anneal.stepps=3"]}, "unknown key 'anneal.stepps': did you mean 'anneal.steps'"),
    ],
)
def test_what_the_command_line_cannot_ask_for_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match="(?s).*") as error:
        run(write_experiment(tmp_path / "right.yaml"), **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unknown_experiments_and_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "torn.yaml").write_text("about: [")
    write_experiment(tmp_path / "stages.yaml")
    for name, message in {
        "smoek": "unknown experiment 'smoek': did you mean smoke?",
        "nothing.yaml": "cannot read nothing.yaml",
        str(tmp_path / "torn.yaml"): "torn.yaml is not valid YAML",
        str(tmp_path / "stages.yaml"): "cannot be called 'stages'",
    }.items():
        with pytest.raises(UserError) as error:
            load_experiment(name)
        assert message in str(error.value)


def test_the_arms_settings_come_after_the_experiments_and_the_command_lines_last(tmp_path):
    changes = {
        "settings": {"anneal": {"steps": 10, "remit": {"epsilon": 0.3}}, "iterations": 3},
        "arms": {"low": {"about": "", "settings": {"anneal": {"remit": {"epsilon": 0.1}, "optim": {"lr": 1e-4}}}}},
        "control": "low",
    }
    name, experiment = load_experiment(str(write_experiment(tmp_path / "epsilons.yaml", **changes)))
    assert name == "epsilons"
    recipe = arm_recipe(experiment, "low", 7, ["iterations=2", "anneal.remit.scale=2"], tmp_path / "run")
    assert (recipe.anneal.steps, recipe.anneal.remit.epsilon, recipe.anneal.remit.scale) == (10, 0.1, 2.0)
    assert (recipe.iterations, recipe.seed, recipe.run_dir) == (2, 7, str(tmp_path / "run"))
    assert recipe.anneal.optim.lr == 1e-4


def test_arms_that_are_to_cost_as_much_as_another_bring_that_one_along(tmp_path):
    arms = {**BASE["arms"], "longer": {**ARM, "equal_flops": "remit"}}
    _, experiment = load_experiment(str(write_experiment(tmp_path / "e.yaml", arms=arms)))
    assert list(experiment.chosen([4], ["longer"]).arms) == ["uniform", "remit", "longer"]
    assert experiment.chosen([4], ["longer"]).seeds == [4]
    assert experiment.chosen() == experiment


def test_another_arm_may_be_the_control(tmp_path):
    _, experiment = load_experiment(str(write_experiment(tmp_path / "e.yaml")))
    assert experiment.control == "uniform"
    chosen = experiment.chosen(control="remit")
    assert chosen == experiment.model_copy(update={"control": "remit"})
    assert list(experiment.chosen(arms=[], control="remit").arms) == ["remit"]


@pytest.mark.parametrize("path", sorted(experiments_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_that_comes_along_is_one_and_its_arms_have_recipes(path, capsys):
    name, experiment = load_experiment(path.stem)
    for arm in experiment.arms:
        arm_recipe(experiment, arm, 1, [], Path("run"))
    assert list_experiments() == 0
    assert name in capsys.readouterr().out


def test_settings_may_be_a_file_beside_the_experiments(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "warm.yaml").write_text("anneal: {optim: {lr: 3e-4}}\n")
    arms = {"uniform": {"about": "", "settings": "parts/warm.yaml"}}
    path = write_experiment(tmp_path / "warm.yaml", arms=arms)
    _, experiment = load_experiment(str(path))
    assert arm_recipe(experiment, "uniform", 1, [], tmp_path).anneal.optim.lr == 3e-4
    arms["uniform"]["settings"] = ["parts/warm.yaml", {"anneal": {"steps": 7}}, {"anneal": {"optim": {"beta2": 0.9}}}]
    _, experiment = load_experiment(str(write_experiment(path, arms=arms)))
    changed = arm_recipe(experiment, "uniform", 1, [], tmp_path).anneal
    assert (changed.steps, changed.optim.lr, changed.optim.beta2) == (7, 3e-4, 0.9)
    for wrong, message in [
        (5, "warm.yaml: settings has 5: expected a mapping"),
        ("parts", "cannot read .*parts"),
        ({"anneal": {"stepps": 7}}, "warm.yaml: settings: unknown key 'anneal.stepps': did you mean 'anneal.steps'"),
    ]:
        arms["uniform"]["settings"] = [wrong]
        with pytest.raises(UserError, match=message):
            load_experiment(str(write_experiment(path, arms=arms)))
    arms["uniform"]["settings"] = "parts/warm.yaml"
    write_experiment(path, arms=arms)
    (tmp_path / "parts" / "warm.yaml").unlink()
    with pytest.raises(UserError, match="cannot read .*parts/warm.yaml"):
        load_experiment(str(path))


def test_rmts_ablations_are_the_files_that_recipes_may_be_changed_by():
    _, experiment = load_experiment("rmt_vs_baselines")
    assert experiment.arms["rpt"].settings["rmt"]["curriculum"]["early"] == [0.0, 0.0, 1.0]
    assert experiment.arms["ntp"].settings == {"rmt": {"objective": "ntp"}} and experiment.arms["rmt"].settings == {}


def test_a_partial_recipe_and_overrides_are_for_every_arm_and_the_last_word_counts(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr("nemo_rmt.experiment.run_experiment", lambda name, options: given.append(options) or 0)
    (tmp_path / "wide.yaml").write_text("model: {hidden_size: 64, num_attention_heads: 8}\nanneal: {steps: 7}\n")
    words = ["smoke", "--yaml", str(tmp_path / "wide.yaml"), "anneal.steps=9"]
    assert cli.main(["experiment", *words]) == 0
    _, experiment = load_experiment("smoke")
    for arm in experiment.arms:
        recipe = arm_recipe(experiment, arm, 1, given[0].overrides, tmp_path)
        assert recipe.model.num_attention_heads == 8 and recipe.model.num_layers == 2
        assert recipe.anneal.steps == 9
    assert cli.main(["experiment", "smoke", "--yaml", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
