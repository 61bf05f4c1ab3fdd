"""Which sequences share a row, and which a rank: bins of one size, and parts of equal work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from nemo_rmt.config import Model
from nemo_rmt.model_flops import forward_flops


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of each row: the longest first, each into the first row that has room for it.

    Never more than 11/9 of the fewest rows there could be, and one. Equal lengths go by index; a row's indices ascend.
    Raises ValueError for a length above ``capacity``.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a length of {length} is above the capacity of {capacity}")
        row = next((row for row, left in enumerate(room) if length <= left), len(room))
        if row == len(room):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return [sorted(row) for row in rows]


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """The indices of each part, so that their sums are near equal: the most costly first, each to the part that has
    least so far.

    The largest sum is at most 4/3 of the best there is. Equal costs go by index, equal parts by number; a part's
    indices ascend; with fewer indices than parts the last are empty.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    least = [(0.0, part) for part in range(parts)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, part = least[0]
        found[part].append(index)
        heapq.heapreplace(least, (load + costs[index], part))
    return [sorted(part) for part in found]


def training_cost(model: Model, vocab_size: int, tokens: int, pairs: int) -> float:
    """Estimated FLOPs of training on tokens of which ``pairs`` attend to one another, each to itself included."""
    return 3 * tokens * sum(forward_flops(model, vocab_size, pairs / tokens)) if tokens else 0.0
