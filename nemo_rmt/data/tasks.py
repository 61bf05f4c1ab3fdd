"""Problems with verifiers: what RL is rewarded on and evaluation measures.

Three splits: ``train`` is endless; ``held_out`` has the same difficulty and problems whose question
hashes to the held-out side, so that no seed trains on them; ``longer`` is harder than anything trained on.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveInt

from nemo_rmt.config import Section, Task
from nemo_rmt.data import chains
from nemo_rmt.data.options import read_options
from nemo_rmt.data.seeds import generator
from nemo_rmt.errors import UserError

Split = Literal["train", "held_out", "longer"]


@dataclass(frozen=True)
class Problem:
    """One problem."""

    question: str
    """The user's message; the chat template adds what stands around it."""
    answer: str
    """The reference answer."""
    solution: str
    """A response that scores 1; empty when the family has none to show."""
    extra: Any = None
    """What the family's verifier needs besides."""


class TaskFamily(ABC):
    """A family of problems and their verifier, built by ``make_task``."""

    solution_options: type[Section] = Section
    """The options ``noisy_solution`` takes."""

    def __init__(self, settings: Task) -> None:
        self.name = settings.name
        self.has_longer = settings.longer is not None
        self._held_out: dict[tuple[str, int], tuple[list[Problem], Iterator[Problem]]] = {}

    @abstractmethod
    def score(self, problem: Problem, response: str) -> float:
        """The verifier's score of a response, in [0, 1]. May raise: see ``guarded_score``."""

    @abstractmethod
    def _train_problem(self, seed: int, index: int) -> Problem:
        """The training problem at ``index``."""

    @abstractmethod
    def _evaluation_problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """Distinct problems of ``held_out`` or ``longer``, ending when there are no more."""

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """The problem at ``index`` of a split's order under ``seed``, the same wherever it is asked for.

        Raises IndexError past the last problem of ``held_out`` or ``longer``.
        """
        if split == "train":
            return self._train_problem(seed, index)
        if split == "longer" and not self.has_longer:
            raise UserError(f"data.tasks[{self.name}].longer is not set: there are no longer problems to draw")
        found, rest = self._held_out.setdefault((split, seed), ([], self._evaluation_problems(split, seed)))
        while len(found) <= index:
            problem = next(rest, None)
            if problem is None:
                raise IndexError(f"task {self.name} has {len(found)} {split} problems, asked for index {index}")
            found.append(problem)
        return found[index]

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """The split's problems in order: endless for ``train``, distinct and finite for the others."""
        index = 0
        while True:
            try:
                problem = self.problem(split, seed, index)
            except IndexError:
                return
            yield problem
            index += 1

    def noisy_solution(self, problem: Problem, rng: random.Random, options: Section) -> str:
        """A solution as found in imperfect data, by ``solution_options``; here always the right one.

        Raises UserError when the family verifies answers without having one itself.
        """
        if not problem.solution:
            raise UserError(
                f"data.tasks[{self.name}] has no solutions to learn from, only a verifier: "
                f"give conversations in data.sft_path, and use another task for a solutions corpus"
            )
        return problem.solution


def guarded_score(task: TaskFamily, problem: Problem, response: str) -> tuple[float, bool]:
    """``(score, errored)``: a verifier that raises, or returns no number in [0, 1], counts as 0.0 and an error.

    Verifiers parse whatever a policy under training produces; none of it may end the run.
    """
    try:
        score = float(task.score(problem, response))
    except Exception:  # noqa: BLE001 - third-party verifiers raise anything; the caller counts it
        return 0.0, True
    if not (math.isfinite(score) and 0.0 <= score <= 1.0):
        return 0.0, True
    return score, False


def make_task(settings: Task) -> TaskFamily:
    """The task of a recipe entry. Raises UserError for an unknown family, dataset or option."""
    family, _, dataset = settings.family.partition(":")
    if settings.family == "chains":
        return ChainTask(settings)
    if family == "reasoning_gym" and dataset:
        from nemo_rmt.data.reasoning_gym_task import ReasoningGymTask  # imports an optional package

        return ReasoningGymTask(settings, dataset)
    if settings.family == "questions":
        from nemo_rmt.data.questions_task import QuestionsTask  # is made of this module's classes

        return QuestionsTask(settings)
    raise UserError(
        f"data.tasks[{settings.name}].family={settings.family!r} is unknown: use 'chains', 'questions' or "
        "'reasoning_gym:<dataset>'"
    )


class ChainOptions(Section):
    """Options of the family ``chains``."""

    lengths: list[PositiveInt] = Field([3, 4, 5], min_length=1)
    """Numbers of operations, drawn uniformly."""


class ChainSolutionOptions(Section):
    """Noise in generated solutions of chains."""

    error_rate: float = Field(0.0, ge=0, lt=1)
    """Probability that a step is wrong."""
    direct: float = Field(0.0, ge=0, le=1)
    """Probability that a solution gives the answer without its working."""


class ChainTask(TaskFamily):
    """Modular-arithmetic chains (``nemo_rmt.data.chains``)."""

    solution_options = ChainSolutionOptions

    def __init__(self, settings: Task) -> None:
        super().__init__(settings)
        key = f"data.tasks[{settings.name}]"
        options = read_options(ChainOptions, settings.options, f"{key}.options")
        self._lengths: dict[str, list[int]] = {"train": options.lengths, "held_out": options.lengths}
        if settings.longer is not None:
            longer = read_options(ChainOptions, {**settings.options, **settings.longer}, f"{key}.longer").lengths
            if min(longer) <= max(options.lengths):
                raise UserError(
                    f"{key}.longer.lengths={longer} must all exceed {key}.options.lengths={options.lengths}"
                )
            self._lengths["longer"] = longer

    def _train_problem(self, seed: int, index: int) -> Problem:
        return self._solved(chains.draw(generator(seed, "train", index), self._lengths["train"]))

    def _evaluation_problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return map(self._solved, chains.held_out_questions(self._lengths[split], seed))

    @staticmethod
    def _solved(question: str) -> Problem:
        solution = chains.solution(question)
        return Problem(question, answer=solution[-1], solution=solution)

    def score(self, problem: Problem, response: str) -> float:
        """1 when what follows the first ``#`` is the answer and nothing else."""
        _, mark, answer = response.partition("#")
        return float(bool(mark) and answer.strip() == problem.answer)

    def noisy_solution(self, problem: Problem, rng: random.Random, options: ChainSolutionOptions) -> str:
        """A solution with wrong steps and missing working, at the rates of ``options``."""
        direct = rng.random() < options.direct
        return chains.solution(problem.question, rng, options.error_rate, direct)
