"""Every recipe resolves, prints, loads again and plans; and beside each stands the YAML that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemo_rmt.recipes import about, build, names

from nemo_rmt import cli
from nemo_rmt.chain import plan_chain
from nemo_rmt.plan.parameters import parameter_count
from nemo_rmt.recipe_io import load_recipe

RECIPES = Path(cli.__file__).parents[1] / "recipes"
LARGE = ["olmo2_1b", "smollm3_3b", "qwen3_14b", "r1_distill_qwen_14b"]


def test_the_list_tells_parameters_gpus_and_stages(capsys):
    assert cli.main(["recipes", "list"]) == 0
    out = capsys.readouterr().out
    for name, *words in [
        ("tiny", "853,376", "pretrain, anneal, rmt, sft, rl"),
        ("olmo2_1b", "1,484,916,736", "16", "anneal, sft, rl"),
        ("qwen3_14b", "14,768,307,200", "16", "rmt"),
    ]:
        (line,) = (line for line in out.splitlines() if line.split("│")[1:2] and line.split("│")[1].strip() == name)
        assert all(word in line for word in words), line


@pytest.mark.parametrize("name", names())
def test_the_yaml_beside_a_recipe_shows_every_value_and_loads_as_the_recipe(name, capsys):
    path = RECIPES / f"{name}.yaml"
    assert cli.main(["recipes", "show", name]) == 0
    assert path.read_text() == capsys.readouterr().out, f"write it again: nemo-rmt recipes show {name} > {path}"
    assert load_recipe(None, [path], []) == build(name)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_says_which_values_are_the_papers(name):
    text = about(name)
    assert "ours" in text.lower() or "where it is said which are the paper's" in text


@pytest.mark.parametrize("name", names())
def test_a_recipe_plans_on_a_machine_without_gpu_and_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", name]) == 0
    assert "GiB" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_one_node_is_too_small_for_the_14b_recipe_and_the_variant_for_it_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "qwen3_14b", "cluster.nodes=2"]) == 0
    assert cli.main(["plan", "qwen3_14b", "cluster.nodes=1"]) == 2
    assert "parallel.tensor=4" in "".join(capsys.readouterr())
    assert cli.main(["plan", "qwen3_14b", "--yaml", str(RECIPES / "variants/one_node_14b.yaml")]) == 0


@pytest.mark.parametrize("variant", ["vllm", "vllm_ahead"])
def test_the_14b_recipe_fits_with_vllm_beside_it_or_on_other_gpus(variant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "qwen3_14b", "--yaml", str(RECIPES / f"variants/{variant}.yaml")]) == 0
    assert "vLLM" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", LARGE)
def test_fp8_without_transformer_engine_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fp8 = ["--yaml", str(RECIPES / "variants/fp8.yaml")]
    assert load_recipe(name, [RECIPES / "variants/fp8.yaml"], []).model.fp8 == "hybrid"
    assert cli.main(["plan", name, *fp8]) == 2
    assert "Transformer Engine" in "".join(capsys.readouterr())


def test_the_rmt_recipes_train_and_measure_and_nothing_else():
    chain = [str(planned.ref) for planned in plan_chain(build("qwen3_14b"))]
    assert chain == ["iteration 0 data", "iteration 0 rmt", "iteration 0 evaluate"]


@pytest.mark.parametrize("key", ["rmt.budget", "rmt.grpo", "rmt.ntp_coefficient", "data.corpora"])
def test_both_14b_recipes_have_the_same_settings(key):
    values = []
    for name in ("qwen3_14b", "r1_distill_qwen_14b"):
        value = build(name)
        for part in key.split("."):
            value = getattr(value, part)
        values.append(value)
    assert values[0] == values[1]


def test_the_variants_of_reasoning_are_larger_and_without_faults():
    large, clean = (
        load_recipe("reasoning", [RECIPES / f"variants/reasoning_{name}.yaml"], []) for name in ("110m", "clean")
    )
    assert 100e6 < parameter_count(large) < 120e6
    assert large.data == build("reasoning").data
    given = {corpus.name: corpus.options for corpus in build("reasoning").data.corpora}
    assert [corpus.name for corpus in clean.data.corpora] == list(given)
    for corpus in clean.data.corpora:
        faults = {name: value for name, value in given[corpus.name].items() if corpus.options.get(name) != value}
        assert set(faults) == ({"error_rate", "direct"} if corpus.kind == "solutions" else set())
    assert not any(clean.data.sft_options.values()) and clean.data.tasks == build("reasoning").data.tasks
