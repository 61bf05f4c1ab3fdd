"""reasoning-gym's problem families, where the optional package is installed."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys

import pytest

from nemo_rmt.config import Corpus, Data, Section, Task
from nemo_rmt.data.corpora import documents
from nemo_rmt.data.sft import SFTExamples
from nemo_rmt.data.tasks import guarded_score, make_task
from nemo_rmt.errors import UserError

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym: pip install nemo-rmt[reasoning]"
)


def make(dataset="chain_sum", **settings):
    return make_task(Task(name="sums", family=f"reasoning_gym:{dataset}", **settings))


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install nemo-rmt\[reasoning\]"):
        make()


@needs_reasoning_gym
def test_splits_are_disjoint_and_repeat():
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 2}
    task = make(options=options)
    held_out = [problem.question for problem in itertools.islice(task.problems("held_out", 1), 30)]
    assert len(held_out) == len(set(held_out)) == 30
    assert set(held_out).isdisjoint(p.question for p in itertools.islice(task.problems("train", 2), 600))
    again = make(options=options)
    assert again.problem("held_out", 1, 29).question == held_out[29]
    assert again.problem("train", 2, 599) == task.problem("train", 2, 599)
    assert again.problem("train", 3, 599) != task.problem("train", 2, 599)


@needs_reasoning_gym
@pytest.mark.parametrize("response", ["{}", " {}\n", "so it is\n<answer>{}</answer>", "<think>1</think>{}"])
def test_answers_are_found_where_a_response_puts_them(response):
    task = make()
    problem = task.problem("train", 0, 0)
    assert guarded_score(task, problem, response.format(problem.answer)) == (1.0, False)
    assert task.score(problem, response.format("no number")) < 0.1


@needs_reasoning_gym
def test_longer_problems_use_their_own_options():
    task = make(longer={"min_terms": 20, "max_terms": 20})
    assert task.problem("longer", 0, 0).question.count("+") + task.problem("longer", 0, 0).question.count("-") >= 19
    assert task.problem("train", 0, 0).question.count("+") < 10


@needs_reasoning_gym
def test_a_dataset_with_few_questions_ends():
    task = make(options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    assert 0 < sum(1 for _ in task.problems("held_out", 0)) < 200


@needs_reasoning_gym
def test_a_dataset_without_reference_answers_cannot_teach_solutions():
    task = make("graph_color")
    with pytest.raises(UserError, match=r"data.tasks\[sums\] has no solutions.*data.sft_path"):
        task.noisy_solution(task.problem("train", 0, 0), random.Random(0), Section())


@needs_reasoning_gym
def test_a_corpus_of_a_dataset_with_worked_solutions_takes_their_faults():
    data = Data(tasks=[Task(name="sums", family="reasoning_gym:chain_sum", options={"max_digits": 2})])
    corpus = Corpus(name="sums", kind="solutions", num_documents=200, options={"task": "sums", "direct": 0.5})
    texts = list(documents(corpus, data, "train", 0, run_seed=0))
    direct = [text for text in texts if "A:<think></think>" in text]
    assert 60 < len(direct) < 140
    assert all("=" in text.split("A:<think>")[1] for text in texts if text not in direct)
    assert texts == list(documents(corpus, data, "train", 0, run_seed=0))


@needs_reasoning_gym
def test_sft_learns_from_worked_solutions_where_a_dataset_has_them_and_from_answers_elsewhere():
    tasks = [Task(name=name, family=f"reasoning_gym:{name}") for name in ("chain_sum", "gcd")]
    examples = SFTExamples(Data(tasks=tasks, sft_options={"direct": 1.0}), 0)
    solutions = [examples[index][1]["content"] for index in range(20)]
    assert all(text.startswith("<think></think>") for text in solutions[::2])
    assert all(text.isdecimal() for text in solutions[1::2])


@needs_reasoning_gym
def test_options_of_worked_solutions_are_refused_where_a_dataset_has_none():
    data = Data(tasks=[Task(name="divisors", family="reasoning_gym:gcd")])
    corpus = Corpus(name="gcd", kind="solutions", options={"task": "divisors", "direct": 0.5})
    with pytest.raises(UserError, match=r"data.corpora\[gcd\].options.direct: unknown option"):
        next(documents(corpus, data, "train", 0, run_seed=0))


@needs_reasoning_gym
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset": "chain_sums"}, "no such dataset; did you mean chain_sum"),
        ({"options": {"min_term": 2}}, r"data.tasks\[sums\].options.min_term: unknown option.*min_terms"),
        ({"options": {"seed": 2}}, r"data.tasks\[sums\].options.seed: unknown option"),
        ({"options": {"min_terms": 9, "max_terms": 2}}, r"data.tasks\[sums\].options=.*refused by chain_sum"),
        ({"longer": {"terms": 9}}, r"data.tasks\[sums\].longer.terms: unknown option"),
    ],
)
def test_wrong_settings_of_a_dataset_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
