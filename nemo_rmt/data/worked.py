"""Worked solutions of reasoning-gym problems, step by step in few tokens, with the faults of real corpora.

reasoning-gym itself gives answers only. A solution written here is ``<think>12+7=19-5=14</think>14``: its working as a
thought, then the answer, where every family's verifier reads it. Like solutions of chains, those in a corpus may have
wrong steps (``error_rate``), no working at all (``direct``), or working that stops early (``lazy``): styles and
mistakes that RL removes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from nemo_rmt.config import Section

_TERM = re.compile(r"(?P<sign>[+-]?) ?(?:(?P<factor>\d+)\*)?(?P<body>[a-z]|\d+)")


class WorkedOptions(Section):
    """Faults of generated solutions, for datasets that have worked ones."""

    error_rate: float = Field(0.0, ge=0, lt=1)
    """Probability that a step is wrong; the working goes on from it."""
    direct: float = Field(0.0, ge=0, le=1)
    """Probability that a solution has no working: an empty thought, then the answer."""
    lazy: float = Field(0.0, ge=0, le=1)
    """Probability that the working stops before its last step, and the answer follows all the same."""


@dataclass(frozen=True)
class Worked:
    """A solution in steps."""

    steps: list[str]
    """Pieces of the working, which read as one text when joined."""
    answer: str
    """What the working comes to."""

    def text(self, steps: int | None = None) -> str:
        """The solution with its first ``steps`` steps; None: with all of them."""
        return f"<think>{''.join(self.steps[:steps])}</think>{self.answer}"


class Slips:
    """Where results come out wrong, each with probability ``rate``. ``rng`` may be None where rate is 0."""

    def __init__(self, rng: random.Random | None = None, rate: float = 0.0) -> None:
        self._rng, self._rate = rng, rate

    def number(self, value: int) -> int:
        """A result, or one that misses it by a unit or two, or by a ten as when a carry is forgotten."""
        return value + self._rng.choice((-10, -2, -1, 1, 2, 10)) if self._happens() else value

    def count(self, value: int) -> int:
        """A count, or one too many or too few; never below 0."""
        return value + self._rng.choice((-1, 1) if value else (1,)) if self._happens() else value

    def letter(self, letter: str) -> str:
        """A letter, or another one."""
        return self._rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != letter]) if self._happens() else letter

    def choice(self, made: bool) -> bool:
        """A decision, or the opposite one."""
        return not made if self._happens() else made

    def _happens(self) -> bool:
        return bool(self._rate) and self._rng.random() < self._rate


def _chain_sum(entry: dict[str, Any], slips: Slips) -> Worked:
    """A running sum: ``12+7=19-5=14``."""
    first, *rest = entry["metadata"]["expression"].split(" ")
    value, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2]):
        value = slips.number(value + int(term) if operator == "+" else value - int(term))
        steps.append(f"{'' if steps else first}{operator}{term}={value}")
    return Worked(steps, str(value))


def _simple_equations(entry: dict[str, Any], slips: Slips) -> Worked:
    """The constant to the other side, then a division: ``3*x=20-5=15 x=5``."""
    variable = entry["metadata"]["variable"]
    left, right = entry["metadata"]["equation"].split(" = ")
    factor = constant = 0
    for term in _TERM.finditer(left):
        sign = -1 if term["sign"] == "-" else 1
        if term["body"] == variable:
            factor = sign * int(term["factor"] or 1)
        else:
            constant = sign * int(term["body"])
    if not factor:  # (3 - 3)*x: the unknown is gone, and the verifier still wants the number that was drawn
        return Worked([], entry["answer"])
    value, steps = int(right), []
    if constant:
        value = slips.number(value - constant)
        product = {1: variable, -1: f"-{variable}"}.get(factor, f"{factor}*{variable}")
        steps.append(f"{product}={right}{-constant:+d}={value}")
    if factor != 1:
        value = slips.number(value // factor)
        steps.append(f"{' ' if steps else ''}{variable}={value}")
    return Worked(steps, str(value))


def _letter_counting(entry: dict[str, Any], slips: Slips) -> Worked:
    """Each word with the count up to its end: `` the=1 sea=2``."""
    letter, count, steps = entry["metadata"]["target_letter"], 0, []
    for word in entry["metadata"]["span"]:
        count = slips.count(count + word.lower().count(letter))
        steps.append(f" {word}={count}")
    return Worked(steps, str(count))


def _number_filtering(entry: dict[str, Any], slips: Slips) -> Worked:
    """Each number with + where it stays and - where it goes, ``37-82+``; then the list of those that stay."""
    metadata = entry["metadata"]
    verb, _, comparison = metadata["operation"].partition("_")
    numbers, bound, kept, steps = metadata["original_numbers"], float(metadata["filter_value"]), [], []
    first_spelt = {float(number): number for number in reversed(numbers)}  # 1.0 is 1 to the verifier where 1 came first
    for number in numbers:
        meant = float(number) > bound if comparison == "larger" else float(number) < bound
        stays = slips.choice(meant == (verb == "keep"))
        kept += [first_spelt[float(number)]] if stays else []
        steps.append(number + ("+" if stays else "-"))
    return Worked(steps, str(kept))


def _spell_backward(entry: dict[str, Any], slips: Slips) -> Worked:
    """The letters one by one, then from the last to the first: `` s u n, n u s``."""
    spelt = [slips.letter(letter) for letter in entry["metadata"]["word"]]
    turned = [slips.letter(letter) for letter in reversed(spelt)]
    forward, back = [f" {letter}" for letter in spelt], [f" {letter}" for letter in turned]
    return Worked([*forward[:-1], forward[-1] + ",", *back], "".join(turned))


_WRITERS: dict[str, Callable[[dict[str, Any], Slips], Worked]] = {
    "chain_sum": _chain_sum,
    "letter_counting": _letter_counting,
    "number_filtering": _number_filtering,
    "simple_equations": _simple_equations,
    "spell_backward": _spell_backward,
}

DATASETS = frozenset(_WRITERS)
"""The reasoning-gym datasets that have worked solutions."""


def solution(dataset: str, entry: dict[str, Any]) -> str:
    """The worked solution of a reasoning-gym entry, which its verifier scores 1. dataset: one of ``DATASETS``."""
    return _WRITERS[dataset](entry, Slips()).text()


def noisy_solution(dataset: str, entry: dict[str, Any], rng: random.Random, options: WorkedOptions) -> str:
    """A solution with the faults that ``options`` asks for, drawn from ``rng``."""
    direct, lazy = rng.random() < options.direct, rng.random() < options.lazy
    worked = _WRITERS[dataset](entry, Slips(rng, options.error_rate))
    if direct:
        return worked.text(steps=0)
    return worked.text(steps=rng.randrange(1, max(2, len(worked.steps))) if lazy else None)
