"""Tasks of the optional package reasoning-gym: over a hundred seeded problem families with verifiers."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from typing import Any

from nemo_rmt.config import Section, Task
from nemo_rmt.data import worked
from nemo_rmt.data.options import nearest
from nemo_rmt.data.seeds import derived_seed, problem_is_held_out
from nemo_rmt.data.tasks import Problem, Split, TaskFamily
from nemo_rmt.errors import UserError

FIRST_SEED = {"train": 0, "held_out": 2**30, "longer": 2**31}
"""Entry i of a dataset with seed s is made from s + i, so each split draws from a range of its own (2**30 wide)."""
SEED_OFFSETS = 2**29
"""Where in its range a split starts, by the run's seed."""
CHUNK = 500
"""Entries per dataset object: some datasets prepare all of theirs when built."""
CANDIDATES = 4
"""Entries set aside for each training problem, for when the first ones are held out."""
PATIENCE = 2_000
"""Entries without a new held-out problem after which a dataset counts as exhausted."""


class ReasoningGymTask(TaskFamily):
    """One reasoning-gym dataset; options are the fields of its configuration, without seed and size.

    Training and evaluation are disjoint twice: by the seeds entries are made from, and by a hash of
    the question, since different seeds can make equal questions. Datasets of ``worked.DATASETS`` have worked solutions,
    with the options ``worked.WorkedOptions``; the solution of any other is its bare answer.
    """

    def __init__(self, settings: Task, dataset: str) -> None:
        super().__init__(settings)
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise UserError(
                f"data.tasks[{settings.name}].family={settings.family!r} needs reasoning-gym: "
                f"pip install nemo-rmt[reasoning]"
            ) from None
        key = f"data.tasks[{settings.name}]"
        if dataset not in DATASETS:
            raise UserError(f"{key}.family={settings.family!r}: no such dataset; {nearest(dataset, DATASETS)}")
        self._create, self._dataset_name = reasoning_gym.create_dataset, dataset
        if dataset in worked.DATASETS:
            self.solution_options = worked.WorkedOptions
        self._options = {"train": settings.options, "held_out": settings.options}
        fields = {field.name for field in dataclasses.fields(DATASETS[dataset][1])} - {"seed", "size"}
        self._check(settings.options, fields, f"{key}.options")
        if settings.longer is not None:
            self._options["longer"] = {**settings.options, **settings.longer}
            self._check(self._options["longer"], fields, f"{key}.longer")
        self._chunks: dict[tuple[str, int], Any] = {}
        self._verifier = self._create(dataset, seed=0, size=CHUNK, **settings.options)

    def _check(self, options: dict[str, Any], fields: set[str], key: str) -> None:
        """Refuse options the dataset does not have or does not accept."""
        for name in options:
            if name not in fields:
                raise UserError(f"{key}.{name}: unknown option of {self._dataset_name}; {nearest(name, fields)}")
        try:
            self._create(self._dataset_name, seed=0, size=CHUNK, **options)
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{key}={options}: refused by {self._dataset_name}: {error}") from None

    def _entry(self, split: Split, seed: int, position: int) -> dict[str, Any]:
        """The entry at ``position`` of a split's endless sequence under a run seed."""
        chunk, index = divmod(position, CHUNK)
        first = FIRST_SEED[split] + derived_seed(seed, "reasoning_gym") % SEED_OFFSETS + chunk * CHUNK
        if (split, first) not in self._chunks:
            if len(self._chunks) >= 8:  # neighbours in use, without keeping all that ever were
                self._chunks.pop(next(iter(self._chunks)))
            options = self._options[split]
            self._chunks[split, first] = self._create(self._dataset_name, seed=first, size=CHUNK, **options)
        return self._chunks[split, first][index]

    def _train_problem(self, seed: int, index: int) -> Problem:
        for candidate in range(PATIENCE):
            problem = self._problem(self._entry("train", seed, index * CANDIDATES + candidate))
            if not problem_is_held_out(problem.question):
                return problem
        raise UserError(
            f"data.tasks[{self.name}]: {PATIENCE} problems in a row belong to the held-out side; its options "
            f"leave too few distinct questions: widen data.tasks[{self.name}].options"
        )

    def _evaluation_problems(self, split: Split, seed: int) -> Iterator[Problem]:
        seen: set[str] = set()
        position = last_new = 0
        while position - last_new < PATIENCE:
            problem = self._problem(self._entry(split, seed, position))
            position += 1
            if problem_is_held_out(problem.question) and problem.question not in seen:
                seen.add(problem.question)
                last_new = position
                yield problem
        if not seen:
            raise UserError(
                f"data.tasks[{self.name}]: none of {PATIENCE} {split} problems is on the held-out side; its "
                f"options leave too few distinct questions: widen data.tasks[{self.name}].options"
            )

    def score(self, problem: Problem, response: str) -> float:
        """reasoning-gym's score of the final answer: what stands in the last ``<answer>...</answer>``, else all
        that follows ``</think>``, else the whole response."""
        answer = response.rpartition("</think>")[2]
        tagged = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
        return self._verifier.score_answer((tagged[-1] if tagged else answer).strip(), problem.extra)

    def noisy_solution(self, problem: Problem, rng: random.Random, options: Section) -> str:
        """A worked solution with the faults of ``options``, where the dataset has worked ones; else the answer."""
        if isinstance(options, worked.WorkedOptions):
            return worked.noisy_solution(self._dataset_name, problem.extra, rng, options)
        return super().noisy_solution(problem, rng, options)

    def _problem(self, entry: dict[str, Any]) -> Problem:
        """An entry as a problem; its verifier wants the entry back."""
        answer = "" if entry["answer"] is None else str(entry["answer"])  # None: many answers are right
        has_working = self._dataset_name in worked.DATASETS
        solution = worked.solution(self._dataset_name, entry) if has_working else answer
        return Problem(entry["question"], answer=answer, solution=solution, extra=entry)
