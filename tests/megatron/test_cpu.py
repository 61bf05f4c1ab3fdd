"""The CPU stand-ins for CUDA: only where they are asked for, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random

from nemo_rmt.megatron.cpu import cuda_on_cpu, redirected, without_compiler

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is redirected with a GPU")


def attributes(*owners) -> dict:
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


def test_every_attribute_is_as_before_after_the_block_even_after_an_error():
    owners = (torch, torch.cuda, torch.Tensor, megatron_random, schedules, DistributedOptimizer)
    before = attributes(*owners)
    with pytest.raises(KeyError), cuda_on_cpu():
        inside = attributes(*owners)
        raise KeyError
    changed = {name for name, value in before.items() if inside[name] is not value}
    assert {("torch.cuda", name) for name in ("current_device", "synchronize", "get_rng_state")} <= changed
    modules = {"torch.cuda", megatron_random.__name__, schedules.__name__}
    assert {owner for owner, _ in changed} == {*modules, "DistributedOptimizer"}
    after = attributes(*owners)
    assert after.keys() == before.keys() and all(after[name] is value for name, value in before.items())


def test_what_megatron_asks_of_cuda_is_answered_for_the_cpu():
    with cuda_on_cpu():
        assert torch.device(torch.cuda.current_device()).type == "cpu"
        torch.cuda.synchronize()
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


def test_the_schedules_count_tokens_on_the_cpu_and_see_torch_otherwise():
    with cuda_on_cpu():
        assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
        assert schedules.torch.zeros(2, device="meta").device.type == "meta"
        assert schedules.torch.Tensor is torch.Tensor and schedules.torch.ones is torch.ones
    assert schedules.torch is torch


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)], ids=str)
def test_cuda_literals_mean_the_cpu_inside_the_block_only(device):
    here = torch.ones(2)
    with redirected():
        made = [torch.zeros(2, device=device), torch.tensor([1.0], device=device), torch.empty(1, device=device)]
        moved = [here.to(device), here.to(device=device), here.cuda(), here.to(device, non_blocking=True)]
        assert {tensor.device.type for tensor in made + moved} == {"cpu"}
        assert here.type() == "torch.cuda.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device=device)
    with pytest.raises((AssertionError, RuntimeError)):
        here.cuda()
    assert here.type() == "torch.FloatTensor"


def test_the_blocks_leave_other_devices_and_results_alone():
    with redirected():
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.equal(torch.arange(3) + 1, torch.tensor([1, 2, 3]))
        assert torch.ones(2).to(torch.float64).dtype == torch.float64


def test_compiling_is_switched_off_inside_the_block_only():
    compiler = torch.compile
    with without_compiler():

        @torch.compile(mode="reduce-overhead")
        def doubled(x):
            return 2 * x

        assert torch.compile(doubled) is doubled and doubled(3) == 6
    assert torch.compile is compiler
