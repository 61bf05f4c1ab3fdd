"""Rows that hold what they can, and parts of equal work."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Model
from nemo_rmt.data.packing import balanced, first_fit_decreasing, training_cost

LENGTHS = st.lists(st.integers(0, 20), max_size=40)


def sums(lengths: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(lengths[index] for index in part) for part in parts]


@given(LENGTHS, st.integers(20, 60))
def test_every_index_is_in_one_row_and_no_row_overflows(lengths, capacity):
    rows = first_fit_decreasing(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(total <= capacity for total in sums(lengths, rows)) and all(rows) and all(r == sorted(r) for r in rows)


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 60))
def test_rows_are_few(lengths, capacity):
    rows, least = len(first_fit_decreasing(lengths, capacity)), -(-sum(lengths) // capacity)
    assert least <= rows <= max(2 * least, 1)


def test_the_longest_go_first_and_ties_by_index():
    assert first_fit_decreasing([3, 7, 3, 5, 2], 10) == [[0, 1], [2, 3, 4]]
    assert first_fit_decreasing([4, 4, 4], 8) == [[0, 1], [2]]
    assert first_fit_decreasing([], 8) == []


def test_what_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="a length of 9 is above the capacity of 8"):
        first_fit_decreasing([2, 9], 8)


@given(LENGTHS, st.integers(1, 6))
def test_parts_differ_by_one_of_their_items_at_most(costs, count):
    parts = balanced(costs, count)
    assert len(parts) == count and sorted(itertools.chain(*parts)) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)
    totals = sums(costs, parts)
    for part, total in zip(parts, totals, strict=True):
        assert total - min((costs[index] for index in part), default=0) <= min(totals)


def test_the_most_costly_go_first_each_to_the_part_with_least():
    assert balanced([2, 9, 4, 4, 3], 2) == [[0, 1], [2, 3, 4]]
    assert balanced([1.0, 1.0, 1.0], 3) == [[0], [1], [2]]
    assert balanced([5], 3) == [[0], [], []]


def test_attention_makes_a_long_sequence_cost_more_than_as_many_tokens_in_short_ones():
    model = Model(num_layers=2, hidden_size=64, ffn_hidden_size=96)

    def sequence(length: int) -> float:
        return training_cost(model, 300, length, length * (length + 1) // 2)

    linear = 6 * (2 * (64 * (2 * 64 + 2 * model.num_query_groups * 16) + 3 * 64 * 96) + 300 * 64)
    assert model.num_attention_heads == 4
    assert sequence(1) == linear + 12 * 2 * 64
    assert sequence(400) - 4 * sequence(100) == 12 * 2 * 64 * (400 * 401 - 4 * 100 * 101) // 2
    assert training_cost(model, 300, 0, 0) == 0


def test_packing_needs_no_torch():
    program = "import sys, nemo_rmt.data.packing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
