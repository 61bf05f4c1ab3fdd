"""The recipe's held-out problems as lm-eval tasks, and what a recipe may ask for; lm-eval itself is not used."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import yaml
from small_recipe import small_recipe

from nemo_rmt.config import Recipe, Task
from nemo_rmt.data.tasks import make_task
from nemo_rmt.errors import UserError
from nemo_rmt.stages.lm_eval import tasks
from nemo_rmt.stages.lm_eval.scoring import process_results
from nemo_rmt.stages.lm_eval.tasks import BASE, check_tasks, chosen_tasks, require_installed, write_tasks

OWN = ["chains", "chains_greedy", "chains_longer", "chains_longer_greedy"]


def asking(**settings: object) -> Recipe:
    return small_recipe("unused", evaluate={"lm_eval": {"enabled": True, **settings}})


@pytest.fixture
def others(tmp_path) -> Path:
    """A folder with two tasks, one below the other, that share a file, and a group of them."""
    (tmp_path / "below").mkdir()
    (tmp_path / "shared").write_text("tag: sums\nprocess_docs: !function code.prepare\n")
    (tmp_path / "one.yaml").write_text("include: shared\ntask: one_digit\n")
    (tmp_path / "below" / "two.yaml").write_text("include: [../shared]\ntask: two_digits\ntag: [hard, long]\n")
    (tmp_path / "group.yaml").write_text("group: digits\ntask: [one_digit, two_digits]\n")
    return tmp_path


def test_by_default_every_split_is_sampled_and_answered_greedily():
    assert chosen_tasks(asking()) == OWN
    check_tasks(asking())


def test_tasks_groups_and_tags_of_the_folder_may_be_asked_for(others):
    names = ["one_digit", "two_digits", "digits", "sums", "hard", "long", "chains"]
    recipe = asking(include=str(others), tasks=names)
    check_tasks(recipe)
    assert chosen_tasks(recipe) == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["chain"]}, "evaluate.lm_eval.tasks: there is no task chain; did you mean chains"),
        ({"tasks": ["two_digit"], "include": "."}, "there is no task two_digit; did you mean two_digits"),
        ({"tasks": ["one"], "include": "nowhere"}, "evaluate.lm_eval.include=.*nowhere is not a folder"),
    ],
)
def test_a_task_that_is_not_there_is_refused_by_name(others, settings, message):
    if "include" in settings:
        settings = settings | {"include": str(others / settings["include"])}
    with pytest.raises(UserError, match=message):
        check_tasks(asking(**settings))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own.yaml", "task: chains_greedy", "defines chains_greedy, which are names of the recipe's own"),
        ("wrong.yaml", "task: [", "wrong.yaml: while parsing"),
        ("alone.yaml", "include: missing\ntask: x", "missing"),
    ],
)
def test_a_folder_whose_tasks_cannot_be_told_apart_or_read_is_refused(others, name, text, message):
    (others / name).write_text(text)
    with pytest.raises(UserError, match=f"evaluate.lm_eval.include.*{message}"):
        check_tasks(asking(include=str(others), tasks=["one_digit"]))


def test_a_folder_without_tasks_chosen_from_it_is_refused(others):
    with pytest.raises(ValueError, match="name those to run in tasks"):
        asking(include=str(others))


def test_two_entries_that_would_make_one_task_are_refused():
    entries = [{"name": "chains"}, {"name": "chains_greedy"}]
    recipe = small_recipe("unused", data={"tasks": entries}, evaluate={"lm_eval": {"enabled": True}})
    with pytest.raises(
        UserError, match=r"data.tasks\[chains_greedy\] and data.tasks\[chains\] both make .* chains_greedy"
    ):
        check_tasks(recipe)


def test_without_lm_eval_it_is_refused_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_installed(small_recipe("unused"))
    with pytest.raises(UserError, match=r"lm-eval is not installed: pip install 'nemo-rmt\[lm-eval\]'"):
        require_installed(asking())


@pytest.fixture
def written(tmp_path) -> Path:
    """The tasks of a recipe that takes 5 problems with 3 samples each."""
    recipe = small_recipe("unused", evaluate={"problems": 5, "samples": 3, "lm_eval": {"enabled": True}})
    questions = write_tasks(recipe, 7, tmp_path / "tasks")
    assert len(questions) == 10
    return tmp_path / "tasks"


def definition(folder: Path, name: str) -> dict:
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def test_tasks_ask_the_problems_that_our_own_evaluation_draws(written):
    task = make_task(Task(name="chains", longer={"lengths": [6, 7]}))
    for name, split in {"chains": "held_out", "chains_longer": "longer"}.items():
        expected = [problem.question for problem in itertools.islice(task.problems(split, 7), 5)]
        for each in (name, f"{name}_greedy"):
            data = Path(definition(written, each)["dataset_kwargs"]["data_files"]["test"])
            assert [json.loads(line)["question"] for line in data.read_text().splitlines()] == expected


def test_tasks_fix_how_often_and_how_problems_are_answered(written):
    assert sorted(path.stem for path in written.glob("*.yaml")) == OWN
    sampled, greedy = definition(written, "chains"), definition(written, "chains_greedy")
    assert (sampled["repeats"], greedy["repeats"]) == (3, 1)
    limits = {"until": [], "max_gen_toks": 12}
    drawn = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert sampled["generation_kwargs"] == {**limits, **drawn}
    assert greedy["generation_kwargs"] == {**limits, "do_sample": False}
    assert [each["metric"] for each in sampled["metric_list"]] == ["pass@1", "pass@3"]
    assert [each["metric"] for each in greedy["metric_list"]] == ["pass@1"]
    assert Path(sampled["include"]) == BASE and BASE.is_file()


def test_only_the_chosen_tasks_are_written(tmp_path):
    assert write_tasks(asking(tasks=["chains_greedy"]), 7, tmp_path / "tasks")
    assert [path.stem for path in (tmp_path / "tasks").glob("*.yaml")] == ["chains_greedy"]


def test_responses_are_scored_by_the_recipes_own_verifier(written):
    record = json.loads((written / "chains_held_out.jsonl").read_text().splitlines()[3])
    right, wrong = f"#{record['answer']}", "#?"
    assert process_results(record, [[right, wrong, right, wrong]]) == {"pass@1": 0.5, "pass@4": 1.0}
    assert process_results(record, [[wrong, wrong]]) == {"pass@1": 0.0, "pass@2": 0.0}
    assert process_results(record, [[right]]) == {"pass@1": 1.0}


def test_a_problem_that_is_not_the_one_asked_is_an_error(written):
    record = json.loads((written / "chains_held_out.jsonl").read_text().splitlines()[0])
    with pytest.raises(ValueError, match="chains held_out 1 asks"):
        process_results({**record, "index": 1}, [["#1"]])


def test_what_the_shipped_file_names_is_there():
    loaded = tasks._read(BASE)
    module, _, function = loaded["process_results"].rpartition(".")
    assert getattr(importlib.import_module(module), function) is process_results
