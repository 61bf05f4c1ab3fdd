"""Independent random streams from one run seed, and the hash that decides what is held out."""

from __future__ import annotations

import hashlib
import heapq
import random
import zlib
from collections.abc import Iterable

HELD_OUT_PROBLEMS = 16
"""One problem in this many is never trained on."""


def derived_seed(seed: int, *names: str | int) -> int:
    """A 64-bit seed of its own for a named use of the run's seed; the same on every machine."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def generator(seed: int, *names: str | int) -> random.Random:
    """A random generator of its own for a named use of the run's seed."""
    return random.Random(derived_seed(seed, *names))


def problem_is_held_out(question: str) -> bool:
    """Whether a problem belongs to evaluation, by its question alone: no seed can move it to training."""
    return zlib.crc32(question.encode()) % HELD_OUT_PROBLEMS == 0


def document_is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out ``fraction``, by its text: exact duplicates stay together."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def document_rank(text: str, seed: int) -> int:
    """A document's place in a random order of all texts, set by the run's seed: SHA-256 of both, as a number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest(), "big")


def last_held_out_rank(texts: Iterable[str], count: int, seed: int) -> int | None:
    """The ``document_rank`` up to which ``count`` (1 or more) distinct texts are held out, the copies of each with it.

    None when there are no more than ``count`` distinct texts, so that nothing would be left. Holds ``count`` numbers in
    memory, however many texts there are.
    """
    lowest: list[int] = []  # negated: heapq's first is its smallest
    members: set[int] = set()
    others = False
    for text in texts:
        rank = document_rank(text, seed)
        if rank in members:
            continue
        if len(lowest) < count:
            heapq.heappush(lowest, -rank)
            members.add(rank)
            continue
        others = True
        if rank < -lowest[0]:
            members.remove(-heapq.heapreplace(lowest, -rank))
            members.add(rank)
    return -lowest[0] if others else None
