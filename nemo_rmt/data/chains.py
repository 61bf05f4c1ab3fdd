"""Modular-arithmetic chains: the smallest task on which RL and ReMiT have a measurable effect in minutes.

A problem is a digit followed by operations on it, ``3+1*2``, worked from left to right, each result
modulo 10. Its text is its question; one in sixteen is held out by a hash of that text. Like real
corpora, documents about chains carry noise and styles that RL removes: wrong steps (``error_rate``),
answers without working, thoughts that stop early (``lazy``).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from nemo_rmt.data.seeds import generator, problem_is_held_out

OPERATIONS = ("+1", "+2", "+3", "-1", "-2", "-3", "*2", "*3")
"""Few enough for a small model to learn the table of results within a million tokens."""

ANNOUNCED_WITHIN = 3
"""How far, at most, the length announced before a thought is from the one it has. Announced exactly, a thought would
only ever have a few lengths, and a budget between them would be a number the model has never read."""

PIECE = re.compile(r"\d|[-+*=#]|[a-z]+|\s|[^\w\s]")
"""Words, signs and line ends of a program."""

Style = Literal["worked", "direct", "program", "think"]
STYLES: tuple[Style, ...] = get_args(Style)


def draw(rng: random.Random, lengths: Sequence[int], held_out: bool = False) -> str:
    """A random problem with one of ``lengths`` operations, from the training or the held-out side."""
    while True:
        operations = rng.choices(OPERATIONS, k=rng.choice(lengths))
        question = str(rng.randrange(10)) + "".join(operations)
        if problem_is_held_out(question) == held_out:
            return question


def held_out_questions(lengths: Sequence[int], seed: int) -> Iterator[str]:
    """Every held-out problem of ``lengths`` once, the lengths taking turns, in an order set by ``seed``."""
    walks = [_walk(length, generator(seed, "chains", length)) for length in sorted(set(lengths))]
    while walks:
        for walk in list(walks):
            question = next(walk, None)
            if question is None:
                walks.remove(walk)
            else:
                yield question


def _walk(length: int, rng: random.Random) -> Iterator[str]:
    """The held-out problems of one length. A step coprime to their number visits each problem once
    without holding them in memory: there are 21 million of 7 operations."""
    total = 10 * len(OPERATIONS) ** length
    position = rng.randrange(total)
    step = 0
    while math.gcd(step, total) != 1:
        step = rng.randrange(total)
    for _ in range(total):
        code, start = divmod(position, 10)
        question = str(start)
        for _ in range(length):
            code, operation = divmod(code, len(OPERATIONS))
            question += OPERATIONS[operation]
        if problem_is_held_out(question):
            yield question
        position = (position + step) % total


def running_values(question: str, rng: random.Random | None = None, error_rate: float = 0.0) -> list[int]:
    """The value before the first operation and after each one (``len(operations) + 1`` digits).

    With probability ``error_rate`` a result is replaced by a wrong digit, and the chain goes on from it.
    """
    values = [int(question[0])]
    for operator, operand in zip(question[1::2], question[2::2]):
        value, number = values[-1], int(operand)
        value = value + number if operator == "+" else value - number if operator == "-" else value * number
        if rng is not None and error_rate and rng.random() < error_rate:
            value += rng.randint(1, 9)
        values.append(value % 10)
    return values


def working(question: str, values: Sequence[int]) -> str:
    """The steps written out: ``3+1=4*2=8``."""
    steps = zip(question[1::2], question[2::2], values[1:])
    return question[0] + "".join(f"{operator}{operand}={value}" for operator, operand, value in steps)


def solution(question: str, rng: random.Random | None = None, error_rate: float = 0.0, direct: bool = False) -> str:
    """A response to the question: ``3+1=4*2=8#8``, or ``#8`` when ``direct``."""
    values = running_values(question, rng, error_rate)
    return ("" if direct else working(question, values)) + f"#{values[-1]}"


def program(question: str) -> str:
    """A small program up to the digit it prints, the one hard token of this raw text."""
    steps = "".join(f"x{operator}{operand}\n" for operator, operand in zip(question[1::2], question[2::2]))
    return f"x={question[0]}\n{steps}print(x%10)\n#"


def document(
    style: Style,
    question: str,
    rng: random.Random,
    error_rate: float,
    lazy: float,
    instruction: str = "",
    anywhere: float = 0.0,
    heading: str = "",
) -> str:
    """A document about one problem.

    worked ``Q:...\nA:3+1=4*2=8#8``; direct ``Q:...\nA:#8``; program: the program and the digit it prints;
    think: ``heading`` and a program with a thought in it, between ``<think>`` and ``</think>``, see :func:`thoughtful`.
    """
    values = running_values(question, rng, error_rate)
    if style in ("worked", "direct"):
        return f"Q:{question}\nA:" + ("" if style == "direct" else working(question, values)) + f"#{values[-1]}"
    if style == "think":
        return heading + thoughtful(question, values, rng, lazy, instruction, anywhere)
    return f"{program(question)}{values[-1]}\n"


def thoughtful(
    question: str, values: Sequence[int], rng: random.Random, lazy: float, instruction: str, anywhere: float
) -> str:
    """A program in which a thought precedes the printed digit, or with probability ``anywhere`` any piece of it.

    The thought is the working of the operations read so far; with probability ``lazy`` it stops after a random step
    (half of those) or is empty (the other half). ``instruction`` stands before it, with ``{budget}`` replaced by its
    length to within ANNOUNCED_WITHIN: characters, which are tokens where digits and operators are tokens of their own,
    as in the tokenizers trained here.
    """
    before, after = program(question), f"{values[-1]}\n"
    if rng.random() < anywhere:
        pieces = PIECE.findall(before)
        # Behind the first line, which nothing could be thought about, and where what follows cannot merge with it.
        cut = rng.choice([index for index in range(4, len(pieces)) if pieces[index - 1] not in "(%)"])
        before, after = "".join(pieces[:cut]), "".join(pieces[cut:]) + after
    steps = len(re.findall(r"x[+*-]\d\n", before))
    scratch = working(question[: 1 + 2 * steps], values[: 1 + steps])
    if rng.random() < lazy:
        scratch = scratch[: 1 + 4 * rng.randrange(max(1, steps))] if rng.random() < 0.5 else ""
    announced = max(0, len(scratch) + rng.randint(-ANNOUNCED_WITHIN, ANNOUNCED_WITHIN)) if instruction else 0
    return f"{before}{instruction.replace('{budget}', str(announced))}<think>{scratch}</think>{after}"
