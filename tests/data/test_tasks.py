"""Tasks: disjoint splits, random access, and verifiers that cannot end a run."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Task
from nemo_rmt.data.tasks import ChainSolutionOptions, Problem, guarded_score, make_task
from nemo_rmt.errors import UserError


@pytest.fixture(scope="module")
def chain_task():
    return make_task(Task(name="chains", longer={"lengths": [6, 7]}))


def test_problems_are_those_found_by_index_and_repeat_for_a_seed(chain_task):
    for split in ("train", "held_out", "longer"):
        first = list(itertools.islice(chain_task.problems(split, seed=3), 50))
        again = make_task(Task(name="chains", longer={"lengths": [6, 7]}))
        assert again.problem(split, 3, 49) == first[49]  # asked out of order
        assert [again.problem(split, 3, index) for index in range(50)] == first
        assert list(itertools.islice(chain_task.problems(split, seed=4), 50)) != first


@given(seed=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_no_seed_trains_on_a_held_out_problem(seed, other):
    task = make_task(Task(name="chains", options={"lengths": [2]}))
    held_out = {problem.question for problem in task.problems("held_out", seed)}
    assert len(held_out) == 56
    assert held_out.isdisjoint(task.problem("train", other, index).question for index in range(50))


def test_held_out_problems_are_distinct_and_end(chain_task):
    questions = [problem.question for problem in chain_task.problems("held_out", 0)]
    assert len(questions) == len(set(questions)) == pytest.approx((5120 + 40960 + 327680) / 16, rel=0.01)
    with pytest.raises(IndexError):
        chain_task.problem("held_out", 0, len(questions))


def test_longer_problems_are_longer(chain_task):
    assert chain_task.has_longer
    assert {len(p.question) // 2 for p in itertools.islice(chain_task.problems("longer", 0), 40)} == {6, 7}


def test_the_clean_solution_scores_one_and_a_wrong_answer_zero(chain_task):
    for problem in itertools.islice(chain_task.problems("train", 0), 100):
        assert chain_task.score(problem, problem.solution) == 1
        assert chain_task.score(problem, problem.solution[:-1] + str((int(problem.answer) + 1) % 10)) == 0


@pytest.mark.parametrize(
    "response, score",
    [("#8", 1), ("# 8\n", 1), ("3+1=4*2=8#8", 1), ("8", 0), ("", 0), ("#8#8", 0), ("#88", 0), ("#8 x", 0)],
)
def test_the_answer_is_all_that_follows_the_first_mark(chain_task, response, score):
    assert chain_task.score(Problem("3+1*2", "8", "#8"), response) == score


def test_noisy_solutions_have_the_asked_rates(chain_task):
    rng, problem = random.Random(0), Problem("3+1*2", "8", "3+1=4*2=8#8")
    options = ChainSolutionOptions(error_rate=0.2, direct=0.3)
    solutions = [chain_task.noisy_solution(problem, rng, options) for _ in range(3000)]
    assert sum(s.startswith("#") for s in solutions) / 3000 == pytest.approx(0.3, abs=0.03)
    worked = [s for s in solutions if not s.startswith("#")]
    assert sum(s == problem.solution for s in worked) / len(worked) == pytest.approx(0.8**2, abs=0.03)
    assert chain_task.noisy_solution(problem, rng, ChainSolutionOptions()) == problem.solution


@pytest.mark.parametrize(
    "verdict", [math.nan, math.inf, -0.1, 1.5, None, "much", ValueError("no parse"), RecursionError()]
)
def test_a_verifier_that_misbehaves_scores_zero_and_is_counted(chain_task, verdict, monkeypatch):
    def score(problem, response):
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    monkeypatch.setattr(chain_task, "score", score)
    assert guarded_score(chain_task, Problem("1", "1", "#1"), "#1") == (0.0, True)


def test_a_verifier_that_behaves_is_believed(chain_task, monkeypatch):
    assert guarded_score(chain_task, Problem("1", "1", "#1"), "#1") == (1.0, False)
    monkeypatch.setattr(chain_task, "score", lambda problem, response: 0.25)
    assert guarded_score(chain_task, Problem("1", "1", "#1"), "#1") == (0.25, False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"family": "chain"}, r"data.tasks\[t\].family='chain' is unknown: use 'chains', 'questions' or"),
        ({"family": "reasoning_gym:"}, "is unknown"),
        ({"options": {"length": [3]}}, r"data.tasks\[t\].options.length: unknown option; did you mean lengths"),
        ({"options": {"lengths": []}}, r"data.tasks\[t\].options.lengths=\[\]"),
        ({"options": {"lengths": [3, "x"]}}, r"data.tasks\[t\].options.lengths.1='x'"),
        ({"longer": {"lengths": [5, 6]}}, "must all exceed"),
        ({"longer": {"size": 6}}, r"data.tasks\[t\].longer.size: unknown option"),
    ],
)
def test_wrong_settings_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        make_task(Task(name="t", **settings))


def test_longer_problems_must_be_configured():
    with pytest.raises(UserError, match=r"data.tasks\[t\].longer is not set"):
        make_task(Task(name="t")).problem("longer", 0, 0)
