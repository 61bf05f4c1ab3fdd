"""Questions with known answers from a local file: GSM8K, DAPO-Math and the like."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from nemo_rmt.config import Section, Task
from nemo_rmt.data.final_answer import final_number, final_text, reference_number
from nemo_rmt.data.options import read_options
from nemo_rmt.data.records import check_columns, short
from nemo_rmt.data.seeds import generator, problem_is_held_out
from nemo_rmt.data.tables import Record, parquet_records, require_package
from nemo_rmt.data.tasks import Problem, Split, TaskFamily
from nemo_rmt.data.text_files import jsonl_records
from nemo_rmt.errors import UserError


class QuestionsOptions(Section):
    """Options of the family ``questions``."""

    path: str
    """A .jsonl or .parquet file with one question a record."""
    question: str = "question"
    """The column of questions."""
    answer: str = "answer"
    """The column of reference answers, texts or numbers. The final answer of a longer text counts: its box, or what
    follows ####."""
    template: str = "{question}"
    """The user's message; {question} is filled in, other braces stay, as in \\boxed{}."""
    match: Literal["number", "exact"] = "number"
    """Compare final answers as numbers, or as texts without white space (see ``nemo_rmt.data.final_answer``)."""

    @field_validator("template")
    @classmethod
    def _has_question(cls, template: str) -> str:
        if "{question}" not in template:
            raise ValueError("template must contain {question}")
        return template


class QuestionsTask(TaskFamily):
    """The questions of a file. Those whose text hashes to the held-out side are never trained on, with any seed.

    Training passes over the others again and again, each epoch in an order of its own. ``longer`` is another file, such
    as the dataset's own test split, whose questions must not be among those trained on. A question that occurs more
    than once counts once. Every process holds the questions in memory.
    """

    def __init__(self, settings: Task) -> None:
        super().__init__(settings)
        key = f"data.tasks[{settings.name}]"
        options = read_options(QuestionsOptions, settings.options, f"{key}.options")
        self._number = options.match == "number"
        problems = _read_problems(options, f"{key}.options")
        self._problems: dict[str, list[Problem]] = {"train": [], "held_out": []}
        for question, problem in problems.items():
            self._problems["held_out" if problem_is_held_out(question) else "train"].append(problem)
        for split, found in self._problems.items():
            if not found:
                raise UserError(
                    f"{key}.options.path={options.path} has {len(problems)} distinct questions, and none of them is on "
                    f"the {split.replace('_', '-')} side: one in sixteen is held out, so give a file with more of them"
                )
        self._epochs: dict[int, tuple[int, list[int]]] = {}
        if settings.longer is not None:
            self._problems["longer"] = self._read_longer(settings, problems, options.match)

    def _read_longer(self, settings: Task, problems: dict[str, Problem], match: str) -> list[Problem]:
        """The problems of the file ``longer`` names. Raises UserError when one of them is trained on."""
        key = f"data.tasks[{settings.name}].longer"
        options = read_options(QuestionsOptions, {**settings.options, **settings.longer}, key)
        if options.match != match:
            raise UserError(f"{key}.match={options.match} must be that of the training questions, {match}")
        longer = _read_problems(options, key)
        trained = [question for question in longer if question in problems and not problem_is_held_out(question)]
        if trained:
            raise UserError(
                f"{key}.path={options.path}: {len(trained)} of its {len(longer)} questions are trained on, such as "
                f"{short(trained[0])}: take them out of one of the files"
            )
        if not longer:
            raise UserError(f"{key}.path={options.path}: the file has no questions")
        return list(longer.values())

    def _train_problem(self, seed: int, index: int) -> Problem:
        problems = self._problems["train"]
        epoch, place = divmod(index, len(problems))
        if self._epochs.get(seed, (None, []))[0] != epoch:
            order = list(range(len(problems)))
            generator(seed, "questions", self.name, epoch).shuffle(order)
            self._epochs[seed] = epoch, order
        return problems[self._epochs[seed][1][place]]

    def _evaluation_problems(self, split: Split, seed: int) -> Iterator[Problem]:
        order = list(self._problems[split])
        generator(seed, "questions", self.name, split).shuffle(order)
        return iter(order)

    def score(self, problem: Problem, response: str) -> float:
        """1 when the response's final answer is the reference's."""
        return float((final_number(response) if self._number else final_text(response)) == problem.extra)


def _read_problems(options: QuestionsOptions, key: str) -> dict[str, Problem]:
    """The distinct questions of a file, in its order, each with its problem; ``extra`` is the answer to compare with.

    Raises UserError naming file and row of a value that is missing or has the wrong type, of an answer that is empty or
    no number where one is needed, and of a question with two different answers.
    """
    problems: dict[str, Problem] = {}
    for record, where in _records(options, key):
        question, answer = record[options.question], _answer_text(record[options.answer], options.answer, where)
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: column {options.question!r} holds {short(question)}, which is no question")
        expected: Fraction | str | None = reference_number(answer) if options.match == "number" else final_text(answer)
        if expected is None or expected == "":
            raise UserError(
                f"{where}: column {options.answer!r} holds {short(answer)}, which "
                + ("is no number: leave it out, or set match: exact" if expected is None else "has no answer in it")
            )
        known = problems.setdefault(
            question, Problem(options.template.replace("{question}", question), str(expected), answer, expected)
        )
        if known.extra != expected:
            raise UserError(
                f"{where}: the answer to {short(question)} is {short(answer)}, and before it was {short(known.answer)}"
            )
    return problems


def _records(options: QuestionsOptions, key: str) -> Iterator[Record]:
    """The records of the file, with both columns."""
    file, columns = Path(options.path).expanduser(), [options.question, options.answer]
    if not file.is_file():
        raise UserError(f"{key}.path={options.path}: no such file")
    if file.suffix == ".parquet":
        require_package("pyarrow", f"{key}.path={options.path}")
        yield from parquet_records(file, columns, key)
    elif file.suffix == ".jsonl":
        for record, where in jsonl_records(file):
            if not isinstance(record, dict):
                raise UserError(f"{where}: each line must be an object with a question and its answer")
            check_columns(columns, list(record), where, key)
            yield record, where
    else:
        raise UserError(f"{key}.path={options.path}: a .jsonl or a .parquet file is needed")


def _answer_text(value: Any, column: str, where: str) -> str:
    """A reference answer as text. Raises UserError for one that is neither text nor number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: column {column!r} holds {short(value)}, which is neither text nor a number")
    return str(value)
