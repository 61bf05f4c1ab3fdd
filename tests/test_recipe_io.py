"""Recipes are read from factories, YAML and overrides, and wrong input is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import CachedReference, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_changes import known_keys
from nemo_rmt.recipe_io import load_recipe, recipe_differences, resolved_yaml

TINY = load_recipe("tiny", [], [])


def write(folder: Path, text: str, name: str = "part.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_factory_is_the_base_and_overrides_win_over_yaml_and_later_yaml_over_earlier(tmp_path):
    first = write(tmp_path, "anneal: {steps: 7, optim: {lr: 1e-3}}\nseed: 5", "first.yaml")
    second = write(tmp_path, "anneal: {steps: 8}\nsft: {steps: 3}", "second.yaml")
    recipe = load_recipe("tiny", [first, second], ["sft.steps=4"])
    assert (recipe.anneal.steps, recipe.sft.steps, recipe.seed) == (8, 4, 5)
    assert recipe.anneal.optim.lr == 1e-3
    assert recipe.anneal.optim.schedule == "linear"  # merged into the recipe's section, not replaced


def test_lists_in_yaml_replace_the_recipes_list(tmp_path):
    recipe = load_recipe(
        "tiny", [write(tmp_path, "data: {corpora: [{name: only, kind: chains}]}\nrmt: {corpora: []}")], []
    )
    assert [corpus.name for corpus in recipe.data.corpora] == ["only"]


def test_without_a_name_every_key_has_its_default():
    assert load_recipe(None, [], []) == Recipe()


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.corpora.1.weight=2", lambda r: r.data.corpora[1].weight == 2.0),
        ("anneal.optim.lr=3e-4", lambda r: r.anneal.optim.lr == 3e-4),
        ("anneal.optim.lr*=0.5", lambda r: r.anneal.optim.lr == TINY.anneal.optim.lr * 0.5),
        ("anneal.lr*=0.5", lambda r: r.anneal.optim.lr == TINY.anneal.optim.lr * 0.5),
        ("rmt.warmup_steps=7", lambda r: r.rmt.optim.warmup_steps == 7),
        ("anneal.steps*=0.1", lambda r: r.anneal.steps == TINY.anneal.steps // 10),
        ("iterations+=1", lambda r: r.iterations == 3),
        ("evaluate.tier_edges=[0.25, 1]", lambda r: r.evaluate.tier_edges == (0.25, 1.0)),
        ("tokenizer.chat_template=null", lambda r: r.tokenizer.chat_template is None),
        ("tokenizer.chat_template={% if x %}a: b{% endif %}", lambda r: r.tokenizer.chat_template.startswith("{% if")),
        ("run_dir=2026", lambda r: r.run_dir == "2026"),
        ("data.tasks.0.longer.lengths=[8]", lambda r: r.data.tasks[0].longer == {"lengths": [8]}),
        ("data.corpora.1.options.error_rate=1e-1", lambda r: r.data.corpora[1].options["error_rate"] == 0.1),
        ("data.sft_options={}", lambda r: r.data.sft_options == {}),
        ("data.sft_options.direct=0.5", lambda r: r.data.sft_options == {**TINY.data.sft_options, "direct": 0.5}),
        ("anneal.remit.reference=/model", lambda r: r.anneal.remit.reference == "/model"),
        ("anneal.remit.reference.cache=/c", lambda r: r.anneal.remit.reference == CachedReference(cache="/c")),
        (
            "anneal.remit.reference={cache: /c, checkpoint: /m}",
            lambda r: r.anneal.remit.reference == CachedReference(cache="/c", checkpoint="/m"),
        ),
        ("anneal.remit={epsilon: 0.5}", lambda r: r.anneal.remit.epsilon == 0.5 and r.anneal.remit.scale == 1.0),
    ],
)
def test_overrides_reach_every_kind_of_key(override, read):
    assert read(load_recipe("tiny", [], [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("anneal.remti.epsilon=0.5", ["anneal.remti.epsilon", "anneal.remit.epsilon"]),
        ("data.corpora.0.wieght=2", ["data.corpora.0.weight"]),
        ("tensor=2", ["'tensor'", "parallel.tensor"]),
        ("seed.x=1", ["seed.x"]),
        ("model.num_layers=four", ["model.num_layers", "four", "integer"]),
        ("model.num_layers=true", ["model.num_layers", "true", "integer"]),
        ("iterations=1.5", ["iterations", "1.5", "integer"]),
        ("model=3", ["model=3", "mapping"]),
        ("model.layers=fast", ["model.layers", "fast", "transformer_engine"]),
        ("data.corpora.7.weight=1", ["data.corpora.7.weight", "4 entries"]),
        ("data.corpora={}", ["data.corpora", "list"]),
        ("anneal.objective*=2", ["anneal.objective", "not a number"]),
        ("anneal.steps+=x", ["anneal.steps", "not a number"]),
        ("anneal.steps=[1", ["anneal.steps", "YAML"]),
        ("model.hidden_size=130", ["model: hidden_size 130", "num_attention_heads 4"]),
        ("anneal.remit.reference.cach=/c", ["anneal.remit.reference.cach'", "anneal.remit.reference.cache"]),
        ("anneal.remit.reference={cach: /c}", ["anneal.remit.reference.cach'", "anneal.remit.reference.cache"]),
        ("anneal.remit.reference.checkpoint=/m", ["anneal.remit.reference.cache is required"]),
        ("anneal.remit.reference=null", ["anneal", "remit.reference"]),
        ("data.tasks=[{name: all}]", ["tasks", "what metrics call all of them together"]),
        ("pretrain.micro_batch_size=3", ["pretrain.global_batch_size=8", "micro_batch_size"]),
        ("steps", ["key=value"]),
    ],
)
def test_a_wrong_override_is_refused_with_its_key_and_what_would_be_right(override, words):
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [], [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(UserError, match="parallel.tensor=3 does not divide model.num_attention_heads=4"):
        load_recipe("tiny", [], ["parallel.tensor=3", "cluster.gpus_per_node=3"])


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: [", "YAML"), ("- 1", "mapping"), ("modle: {}", "model"), ("data: {tasks: [{nam: a}]}", "name")],
)
def test_a_wrong_yaml_file_is_refused(tmp_path, text, word):
    with pytest.raises(UserError, match=word):
        load_recipe("tiny", [write(tmp_path, text)], [])


def test_a_missing_yaml_file_and_an_unknown_recipe_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.yaml"):
        load_recipe("tiny", [tmp_path / "nothing.yaml"], [])
    with pytest.raises(UserError, match="did you mean tiny"):
        load_recipe("tyni", [], [])


def test_a_key_of_text_or_a_section_takes_either_in_yaml_too(tmp_path):
    section = write(tmp_path, "anneal: {remit: {reference: {cache: /c}}}")
    assert load_recipe("tiny", [section], []).anneal.remit.reference == CachedReference(cache="/c")
    recipe = load_recipe("tiny", [section], ["anneal.remit.reference.checkpoint=/m"])
    assert recipe.anneal.remit.reference == CachedReference(cache="/c", checkpoint="/m")
    assert load_recipe(None, [write(tmp_path, resolved_yaml(recipe, comments=True), "shown.yaml")], []) == recipe
    assert load_recipe("tiny", [section], ["anneal.remit.reference=previous"]) == TINY
    for wrong, words in {"5": "anneal.remit.reference=5", "{cache: 5}": "anneal.remit.reference.cache=5"}.items():
        with pytest.raises(UserError, match=f"^{words}: expected a valid string$"):
            load_recipe("tiny", [write(tmp_path, f"anneal: {{remit: {{reference: {wrong}}}}}")], [])


@pytest.mark.parametrize("comments", [True, False])
def test_the_resolved_yaml_loads_again_unchanged(tmp_path, comments):
    recipe = load_recipe("tiny", [], ["anneal.optim.lr=1e-8", "data.tasks.0.options.lengths=[3]", "name='a: #b'"])
    assert load_recipe(None, [write(tmp_path, resolved_yaml(recipe, comments))], []) == recipe


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_any_text_survives_the_resolved_yaml(text):
    recipe = Recipe(name=text)
    assert Recipe.model_validate(yaml.safe_load(resolved_yaml(recipe, comments=True))) == recipe


def test_every_key_has_a_comment():
    text = resolved_yaml(load_recipe("tiny", [], []), comments=True)
    keys = [line for line in text.splitlines() if line.strip().endswith("optim:")]
    assert len(keys) == 5
    assert "# Peak learning rate." in text
    assert "data.corpora.0.weight" in known_keys()


def test_differences_name_the_key_and_both_values():
    a, b = (
        load_recipe("tiny", [], []),
        load_recipe("tiny", [], ["anneal.steps=9", "data.corpora=[{name: programs, kind: chains}]"]),
    )
    steps, corpora = sorted(recipe_differences(a, b), key=len)
    assert steps == f"anneal.steps: {a.anneal.steps} -> 9"
    assert corpora.startswith("data.corpora: [") and "-> [{" in corpora
    assert recipe_differences(a, a) == []
