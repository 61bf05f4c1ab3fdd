"""Independent random streams from one run seed, and the hash that decides what is held out."""

from __future__ import annotations

import hashlib
import random
import zlib

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
