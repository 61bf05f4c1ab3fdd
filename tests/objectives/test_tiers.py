"""Entropy tiers against numpy."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.objectives import assign_tiers, tier_edges

entropies = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=40)


@given(entropies)
def test_tiers_count_the_edges_an_entropy_has_reached(values):
    tiers = assign_tiers(torch.tensor(values), (0.5, 1.5))
    assert tiers.tolist() == [(value >= 0.5) + (value >= 1.5) for value in values]
    assert tiers.dtype == torch.int64


def test_tiers_keep_the_shape_of_a_batch():
    assert assign_tiers(torch.tensor([[0.1, 0.5], [1.0, 9.0]]).t(), (0.5, 1.5)).tolist() == [[0, 1], [1, 2]]


@given(entropies)
def test_edges_equal_numpy_quantiles(values):
    edges = tier_edges(torch.tensor(values).reshape(1, -1), (0.0, 0.25, 0.9, 1.0))
    assert edges == pytest.approx(numpy.quantile(numpy.array(values), (0.0, 0.25, 0.9, 1.0)).tolist())


def test_edges_by_quantile_give_tiers_of_the_asked_size():
    entropy = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) / 100
    counts = torch.bincount(assign_tiers(entropy, tier_edges(entropy, (0.5, 0.8))), minlength=3)
    assert counts.tolist() == [500, 300, 200]


def test_edges_that_descend_or_are_missing_are_refused():
    with pytest.raises(ValueError, match=r"edges must be ascending, got \[1.5, 0.5\]"):
        assign_tiers(torch.zeros(2), (1.5, 0.5))
    with pytest.raises(ValueError, match="at least one"):
        assign_tiers(torch.zeros(2), ())


@pytest.mark.parametrize("quantiles", [(), (0.8, 0.2), (-0.1,), (1.1,)])
def test_wrong_quantiles_are_refused(quantiles):
    with pytest.raises(ValueError, match="quantiles must be ascending values"):
        tier_edges(torch.zeros(2), quantiles)


def test_edges_of_no_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        tier_edges(torch.zeros(0), (0.5,))
