"""Questions from a file: disjoint splits, epochs, verdicts, and errors that name the row."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import pytest

from nemo_rmt.config import Data, Task
from nemo_rmt.data.seeds import problem_is_held_out
from nemo_rmt.data.sft import SFTExamples
from nemo_rmt.data.tasks import Problem, guarded_score, make_task
from nemo_rmt.errors import UserError

QUESTIONS = [(f"What is {index} + 1?", f"Add one.\n#### {index + 1:,}") for index in range(300)]


@pytest.fixture
def write(tmp_path):
    def write(*records, name="maths.jsonl", columns=("question", "answer")):
        path = tmp_path / name
        records = [record if isinstance(record, dict) else dict(zip(columns, record)) for record in records]
        if path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install nemo-rmt[data]")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def make(path, longer=None, **options):
    return make_task(Task(name="maths", family="questions", options={"path": path, **options}, longer=longer))


def questions(task, split, seed, count=None):
    return [problem.question for problem in itertools.islice(task.problems(split, seed), count)]


def test_training_and_held_out_questions_are_all_of_the_file_and_no_seed_mixes_them(write):
    task = make(write(*QUESTIONS))
    held_out = questions(task, "held_out", 0)
    assert set(held_out) == {question for question, _ in QUESTIONS if problem_is_held_out(question)}
    assert len(held_out) == len(set(held_out)) > 5
    for seed in (0, 1):
        assert set(questions(task, "train", seed, 300 - len(held_out))) == {q for q, _ in QUESTIONS} - set(held_out)
    assert set(questions(task, "held_out", 1)) == set(held_out)
    assert questions(task, "held_out", 1) != held_out
    with pytest.raises(IndexError):
        task.problem("held_out", 0, len(held_out))


def test_each_epoch_has_every_question_once_in_an_order_of_its_own(write):
    task = make(write(*QUESTIONS))
    size = 300 - len(questions(task, "held_out", 0))
    first, second = (questions(task, "train", 0, 2 * size)[begin : begin + size] for begin in (0, size))
    assert sorted(first) == sorted(second) and first != second
    again = make(write(*QUESTIONS))
    assert again.problem("train", 0, size + 3).question == second[3]  # asked out of order
    assert again.problem("train", 1, size + 3).question != second[3]
    assert again.problem("train", 0, 3).question == first[3]


def test_the_side_of_a_question_does_not_depend_on_the_template(write):
    path = write(*QUESTIONS)
    template = r"{question} Answer in \boxed{}, as in {other}."
    plain, dressed = make(path), make(path, template=template)
    assert questions(dressed, "held_out", 0) == [
        rf"{question} Answer in \boxed{{}}, as in {{other}}." for question in questions(plain, "held_out", 0)
    ]


@pytest.mark.parametrize("name", ["maths.jsonl", "maths.parquet"])
def test_columns_are_those_named_and_numbers_are_answers_too(write, name):
    records = [(f"{index}/2?", index / 2, index) for index in range(100)]
    path = write(*records, name=name, columns=("prompt", "half", "whole"))
    for column, answer in (("half", r"\frac{7}{2}"), ("whole", "7")):
        task = make(path, question="prompt", answer=column)
        every = [*task.problems("held_out", 0), *itertools.islice(task.problems("train", 0), 100)]
        seven = next(problem for problem in every if problem.question == "7/2?")
        assert task.score(seven, rf"It is \boxed{{{answer}}}.") == 1
        assert task.score(seven, "It is 8.") == 0


def test_repeated_questions_count_once(write):
    once, again = (
        make(write(*QUESTIONS)),
        make(write(*QUESTIONS, *QUESTIONS, ("What is 7 + 1?", "8.0"), name="b.jsonl")),
    )
    for split in ("held_out", "train"):
        assert questions(again, split, 0, 400) == questions(once, split, 0, 400)


def test_the_reference_answer_is_a_solution_to_learn_from(write):
    path = write(*QUESTIONS)
    task = make(path)
    for problem in itertools.islice(task.problems("train", 0), 300):
        assert guarded_score(task, problem, problem.solution) == (1.0, False)
        assert problem.solution.startswith("Add one.")
    tasks = [Task(name="maths", family="questions", options={"path": path})]
    user, assistant = SFTExamples(Data(tasks=tasks), seed=0)[0]
    assert (user["content"], assistant["content"]) in QUESTIONS


@pytest.mark.parametrize(
    "match, reference, response, score",
    [
        ("number", "1/2", "so it is 0.5", 1),
        ("number", "1/2", r"\boxed{\frac{1}{2}}", 1),
        ("number", "1/2", r"\boxed{0.5x}", 0),
        ("number", "2", "<think>2", 1),
        ("number", "2", "<think>2</think>", 0),
        ("number", "2", "\\boxed{__import__('os')} 2", 0),
        ("number", "2", "", 0),
        ("exact", "(1, 2)", r"\boxed{\left(1,2\right)}", 1),
        ("exact", "Monday", "Tuesday\nMonday.", 1),
        ("exact", "Monday", "Monday\nTuesday", 0),
        ("exact", "1/2", "0.5", 0),
        ("exact", "2", "", 0),
    ],
)
def test_a_response_scores_when_its_final_answer_is_the_reference(write, match, reference, response, score):
    path = write(*((question, reference) for question, _ in QUESTIONS))
    task = make(path, match=match)
    assert guarded_score(task, task.problem("train", 0, 0), response) == (score, False)


def test_longer_questions_are_all_of_another_file(write):
    harder = [(f"What is {index} + 1?", str(index + 1)) for index in range(1000, 1030)]
    held_out = next(record for record in QUESTIONS if problem_is_held_out(record[0]))
    task = make(write(*QUESTIONS), longer={"path": write(*harder, held_out, name="harder.jsonl")})
    assert task.has_longer
    assert set(questions(task, "longer", 0)) == {question for question, _ in [*harder, held_out]}
    assert task.score(task.problem("longer", 0, 0), task.problem("longer", 0, 0).answer) == 1


def test_a_question_that_is_trained_on_cannot_be_a_longer_one(write):
    trained = next(record for record in QUESTIONS if not problem_is_held_out(record[0]))
    longer = {"path": write(trained, ("new?", "1"), name="harder.jsonl")}
    with pytest.raises(UserError, match=r"data.tasks\[maths\].longer.path=.*: 1 of its 2 questions are trained on"):
        make(write(*QUESTIONS), longer=longer)


@pytest.mark.parametrize(
    "records, message",
    [
        ([("?", "two")], r"maths.jsonl:1: column 'answer' holds 'two', which is no number: leave it out, or set match"),
        ([("?", "1"), ("", "1")], r"maths.jsonl:2: column 'question' holds '', which is no question"),
        ([("?", None)], r"maths.jsonl:1: column 'answer' holds None, which is neither text nor a number"),
        ([("?", True)], r"column 'answer' holds True, which is neither"),
        ([(3, "1")], r"column 'question' holds 3, which is no question"),
        ([{"question": "?"}], r"no column 'answer', which data.tasks\[maths\].options asks for; its columns: question"),
        ([("?", "1"), ("!", "1"), ("?", "2")], r"maths.jsonl:3: the answer to '\?' is '2', and before it was '1'"),
        ([("?", "1")], r"has 1 distinct questions, and none of them is on the (train|held-out) side"),
        ([], r"has 0 distinct questions"),
    ],
)
def test_what_cannot_be_asked_names_file_and_row(write, records, message):
    with pytest.raises(UserError, match=message):
        make(write(*records))


def test_rows_of_tables_are_named_too(write):
    with pytest.raises(UserError, match=r"maths.parquet, row 1: column 'answer' holds 'two', which is no number"):
        make(write(("?", "1"), ("!", "two"), name="maths.parquet"))


def test_an_answer_without_text_is_refused(write):
    with pytest.raises(UserError, match="which has no answer in it"):
        make(write(("?", " \n")), match="exact")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, r"data.tasks\[maths\].options.path"),
        ({"path": "/nowhere.jsonl"}, r"data.tasks\[maths\].options.path=/nowhere.jsonl: no such file"),
        ({"path": __file__}, r"a .jsonl or a .parquet file is needed"),
        ({"path": __file__, "answers": "x"}, r"options.answers: unknown option; did you mean answer"),
        ({"path": __file__, "template": "Solve {problem}"}, r"template must contain \{question\}"),
        ({"path": __file__, "match": "sympy"}, r"data.tasks\[maths\].options.match='sympy'"),
    ],
)
def test_wrong_options_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        make_task(Task(name="maths", family="questions", options=settings))


def test_longer_questions_are_matched_like_the_others(write):
    longer = {"path": write(("new?", "1"), name="harder.jsonl"), "match": "exact"}
    with pytest.raises(UserError, match=r"data.tasks\[maths\].longer.match=exact must be that of the training"):
        make(write(*QUESTIONS), longer=longer)


def test_a_problem_made_by_hand_is_scored_by_its_extra(write):
    task = make(write(*QUESTIONS))
    assert task.score(Problem("?", "2", "2", Fraction(2)), "2.0") == 1
