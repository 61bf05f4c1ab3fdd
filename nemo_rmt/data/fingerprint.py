"""What identifies a tokenized dataset, so that what was computed of one is not taken for another's. No torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

FINGERPRINTED = 16 * 2**20
"""Bytes at each end of a dataset's tokens that its fingerprint reads."""


def dataset_fingerprint(prefix: Path) -> str:
    """sha256 of a dataset: its index, its size, and the first and last 16 MiB of its tokens.

    The index holds every document's length, so that other documents would have to agree in all of it.
    """
    digest = hashlib.sha256()
    with open(f"{prefix}.idx", "rb") as index:
        while block := index.read(FINGERPRINTED):
            digest.update(block)
    hash_ends(digest, Path(f"{prefix}.bin"))
    return digest.hexdigest()


def hash_ends(digest: hashlib._Hash, file: Path) -> None:
    """Add a large file's size and its first and last 16 MiB to a digest."""
    size = os.path.getsize(file)
    digest.update(str(size).encode())
    with open(file, "rb") as contents:
        digest.update(contents.read(FINGERPRINTED))
        contents.seek(max(0, size - FINGERPRINTED))
        digest.update(contents.read(FINGERPRINTED))


def dataset_exists(prefix: Path) -> bool:
    """Whether both files of an indexed dataset are there and not empty."""
    paths = [f"{prefix}{suffix}" for suffix in (".bin", ".idx")]
    return all(os.path.isfile(path) and os.path.getsize(path) for path in paths)
