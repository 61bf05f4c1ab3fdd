"""What the blocks of a cache of log-probabilities are: their documents, the windows in which these are scored, and the
files that each block has. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

BLOCK_TOKENS = 2**22
UNSCORED = 65535
NUMBERS = numpy.dtype("<u2")


@dataclass(frozen=True)
class Kind:
    """One of the files that every block has."""

    suffix: str
    dtype: numpy.dtype
    width: int
    """Numbers for each token."""
    unscored: int
    """What stands at a token without a score."""

    @property
    def token_bytes(self) -> int:
        """Bytes for each token."""
        return self.width * self.dtype.itemsize

    def empty(self, tokens: int) -> numpy.ndarray:
        """``[tokens, width]``, none of which has a score."""
        return numpy.full((tokens, self.width), self.unscored, self.dtype)


LOGPROBS = Kind("u16", NUMBERS, 1, UNSCORED)


def kinds_of(plan: dict[str, Any]) -> list[Kind]:
    """Of a cache that plan.json describes: its log-probabilities, and with top_k the likeliest tokens and theirs."""
    width = plan.get("top_k", 0)
    if not width:
        return [LOGPROBS]
    size = 2 if plan["vocab_size"] <= 2**16 else 4
    tokens = Kind(f"top_tokens.u{8 * size}", numpy.dtype(f"<u{size}"), width, 0)
    return [LOGPROBS, tokens, Kind("top_logprobs.u16", NUMBERS, width, UNSCORED)]


def block_bounds(lengths: numpy.ndarray) -> numpy.ndarray:
    """``[blocks + 1]``: the first document of each block, and the number of documents. lengths: tokens of each."""
    starts = numpy.cumsum(lengths, dtype=numpy.int64) - lengths
    _, first = numpy.unique(starts // BLOCK_TOKENS, return_index=True)
    return numpy.append(first, len(lengths))


def windows(lengths: numpy.ndarray, longest: int) -> numpy.ndarray:
    """What to score documents in, int64 ``[windows, 3]``: the first token of each window among all, its size, and the
    first of its own tokens whose score is taken, counted from its beginning.

    A document of up to ``longest`` tokens is one window; windows of a longer one overlap by half. Each token is taken
    from the window that has most of its document before it. A window of one token predicts nothing and is left out.
    """
    step = longest // 2
    starts = numpy.cumsum(lengths, dtype=numpy.int64) - lengths
    counts = 1 + -(-numpy.maximum(lengths.astype(numpy.int64) - longest, 0) // step)
    document = numpy.repeat(numpy.arange(len(lengths)), counts)
    number = numpy.arange(len(document)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    size = numpy.minimum(longest, lengths[document] - number * step)
    taken = numpy.where(number == 0, 1, longest - step)
    found = numpy.stack([starts[document] + number * step, size, taken], 1)
    return found[found[:, 1] > 1]
