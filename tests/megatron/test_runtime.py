"""The process group of one process."""

from __future__ import annotations

import datetime
import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from small_recipe import small_recipe

from nemo_rmt.megatron.runtime import COLLECTIVE_TIMEOUT, distributed, max_over_ranks


def timeouts() -> set[datetime.timedelta]:
    """Of the world, and of the groups that Megatron makes in it."""
    groups = [dist.group.WORLD, parallel_state.get_data_parallel_group(), parallel_state.get_model_parallel_group()]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_every_group_waits_as_long_as_it_is_told():
    parallel = small_recipe("unused").parallel
    with distributed(parallel, 1):
        assert timeouts() == {COLLECTIVE_TIMEOUT}
    with distributed(parallel, 1, datetime.timedelta(minutes=7)):
        assert timeouts() == {datetime.timedelta(minutes=7)}


def test_what_is_not_finite_is_the_largest_of_all_ranks():
    with distributed(small_recipe("unused").parallel, 1):
        assert max_over_ranks([2.5, math.nan, -math.inf, -1.0]) == [2.5, math.inf, math.inf, -1.0]
