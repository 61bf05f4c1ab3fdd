"""The random numbers behind sampled tokens."""

from __future__ import annotations

import numpy
import pytest

from nemo_rmt.rollout.engine import Sampling, sampling_noise


def noise(ids: list[int], seed: int = 1, length: int = 16) -> numpy.ndarray:
    return sampling_noise(ids, Sampling(length, frozenset(), seed=seed))


def test_a_sequences_stream_does_not_depend_on_order_batch_or_length():
    together = noise([5, 2, 9])
    assert numpy.array_equal(noise([9, 5, 2])[[1, 2, 0]], together)
    assert numpy.array_equal(noise([2])[0], together[1])
    assert numpy.array_equal(noise([2], length=7)[0], together[1, :7])


def test_streams_differ_by_sequence_and_by_seed():
    every = [tuple(row) for seed in (0, 1, 2**31 - 1) for row in noise(list(range(200)), seed)]
    assert len(set(every)) == len(every)
    # neither argument can be traded for the other
    assert not numpy.array_equal(noise([3], seed=4), noise([4], seed=3))


def test_numbers_are_uniform_below_1_and_uncorrelated_between_neighbours():
    drawn = noise(list(range(2000)), length=32)
    assert drawn.shape == (2000, 32) and drawn.min() >= 0 and drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.005) and drawn.var() == pytest.approx(1 / 12, abs=0.001)
    assert abs(numpy.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
