"""Worked solutions of reasoning-gym problems: right ones score, and faults come at their rates."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re

import pytest

from nemo_rmt.config import Task
from nemo_rmt.data import worked
from nemo_rmt.data.tasks import guarded_score, make_task

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym: pip install nemo-rmt[reasoning]"
)

SETTINGS = {
    "chain_sum": [{}, {"max_terms": 1, "min_terms": 1}, {"allow_negation": True, "max_digits": 2}],
    "simple_equations": [
        {},
        {"min_terms": 1, "max_terms": 6, "max_value": 3},
        {"operators": ["+", "-"], "operators_weights": [0.5, 0.5], "max_value": 9},
    ],
    "letter_counting": [{}, {"min_words": 1, "max_words": 2}],
    "number_filtering": [{}, {"min_numbers": 1, "max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 9}],
    "spell_backward": [{}, {"min_word_len": 1, "max_word_len": 2}],
}

EXAMPLES = {
    "chain_sum": ({"expression": "12 + 7 - 25"}, ["12+7=19", "-25=-6"], "-6"),
    "simple_equations": ({"equation": "5 - 3*x = -10", "variable": "x"}, ["-3*x=-10-5=-15", " x=5"], "5"),
    "letter_counting": ({"span": ["The", "sea", "Eel"], "target_letter": "e"}, [" The=1", " sea=2", " Eel=4"], "4"),
    "number_filtering": (
        {"original_numbers": ["3", "12", "5"], "filter_value": "5", "operation": "remove_larger"},
        ["3+", "12-", "5+"],
        "['3', '5']",
    ),
    "spell_backward": ({"word": "sun"}, [" s", " u", " n,", " n", " u", " s"], "nus"),
}


def entry(dataset):
    return {"metadata": EXAMPLES[dataset][0]}


def noisy(dataset, count=2000, **options):
    rng = random.Random(0)
    return [worked.noisy_solution(dataset, entry(dataset), rng, worked.WorkedOptions(**options)) for _ in range(count)]


def share(texts, text):
    return sum(each == text for each in texts) / len(texts)


@needs_reasoning_gym
@pytest.mark.parametrize("dataset, options", [(name, options) for name in SETTINGS for options in SETTINGS[name]])
def test_a_worked_solution_without_faults_scores_with_the_datasets_own_verifier(dataset, options):
    task = make_task(Task(name="task", family=f"reasoning_gym:{dataset}", options=options))
    for problem in itertools.islice(task.problems("train", 0), 300):
        text = task.noisy_solution(problem, random.Random(0), worked.WorkedOptions())
        assert guarded_score(task, problem, text) == (1.0, False), (problem.question, text)
        assert text == problem.solution


def test_every_dataset_is_tested():
    assert worked.DATASETS == SETTINGS.keys() == EXAMPLES.keys()


@pytest.mark.parametrize("dataset", EXAMPLES)
def test_working_is_written_step_by_step_before_the_answer(dataset):
    _, steps, answer = EXAMPLES[dataset]
    assert worked.solution(dataset, entry(dataset)) == f"<think>{''.join(steps)}</think>{answer}"


@pytest.mark.parametrize(
    "equation, working",
    [
        ("3*y + 5 = 20", "3*y=20-5=15 y=5"),
        ("y - 4 = 3", "y=3+4=7"),
        ("4 - y = -3", "-y=-3-4=-7 y=7"),
        ("12*y = 36", "y=3"),
        ("y = 8", ""),
    ],
)
def test_equations_are_solved_by_a_subtraction_and_a_division_where_they_need_them(equation, working):
    text = worked.solution("simple_equations", {"metadata": {"equation": equation, "variable": "y"}})
    assert text.startswith(f"<think>{working}</think>")


@pytest.mark.parametrize("dataset", EXAMPLES)
def test_direct_and_lazy_solutions_keep_the_right_answer_at_their_rates(dataset):
    _, steps, answer = EXAMPLES[dataset]
    texts = noisy(dataset, direct=0.3, lazy=0.5)
    stopped = {f"<think>{''.join(steps[:count])}</think>{answer}" for count in range(1, len(steps))}
    assert set(texts) == {f"<think></think>{answer}", worked.solution(dataset, entry(dataset)), *stopped}
    assert share(texts, f"<think></think>{answer}") == pytest.approx(0.3, abs=0.03)
    assert share(texts, worked.solution(dataset, entry(dataset))) == pytest.approx(0.35, abs=0.03)


@pytest.mark.parametrize("dataset", EXAMPLES)
def test_steps_are_wrong_at_the_error_rate_and_the_working_goes_on_from_them(dataset):
    _, steps, _ = EXAMPLES[dataset]
    texts = noisy(dataset, error_rate=0.2)
    assert share(texts, worked.solution(dataset, entry(dataset))) == pytest.approx(0.8 ** len(steps), abs=0.03)
    for text in texts:
        thought, answer = text.removeprefix("<think>").split("</think>")
        kept = str(re.findall(r"(\d+)\+", thought))
        assert kept == answer if dataset == "number_filtering" else thought.replace(" ", "").endswith(answer)


def test_the_step_after_a_wrong_one_is_made_from_its_result():
    """12+7=19-25=-6: where the sum is wrong and the difference is not, the difference is of the wrong sum."""
    sums = [text.split("=")[1:] for text in noisy("chain_sum", error_rate=0.2)]
    went_on = [(int(first.removesuffix("-25")), int(second.split("<")[0])) for first, second in sums]
    wrong = [(first, second) for first, second in went_on if first != 19]
    assert sum(second == first - 25 for first, second in wrong) / len(wrong) == pytest.approx(0.8, abs=0.06)
