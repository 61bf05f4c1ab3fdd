"""Start-up and shutdown of one training process, from the environment its launcher gives it, or alone."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_rmt.config import Parallel
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.cpu import cuda_on_cpu

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others unless it is told otherwise."""


@dataclass(frozen=True)
class Layout:
    """This process's place: ranks and sizes of every parallel dimension, and its device."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        """Whether the log-probabilities appear here."""
        return self.pipeline_rank == self.pipeline_size - 1


def _environment() -> tuple[int, int, int]:
    """Rank, world size and local rank; a process without RANK is a world of one."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    return 0, 1, 0


@contextlib.contextmanager
def distributed(parallel: Parallel, seed: int, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> Iterator[Layout]:
    """Join the process group and lay the model-parallel groups; leave both when the block ends.

    NCCL with a GPU per process, gloo on the CPU otherwise. timeout: of every collective. Raises UserError when the
    number of processes is no multiple of the model-parallel size.
    """
    rank, world, local = _environment()
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world % model_size:
        raise UserError(
            f"{world} processes were started, but parallel.tensor × pipeline × context = {model_size} does not divide "
            f"them: start a multiple of {model_size} or change parallel.*"
        )
    gpu = torch.cuda.is_available()
    with cuda_on_cpu():
        if gpu:
            torch.cuda.set_device(local)
        store = dist.HashStore() if world == 1 else None
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
                context_parallel_size=parallel.context,
                # Megatron makes the groups with a timeout of its own, 30 minutes, not with the world's.
                distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
            )
            # Pipeline stages must not begin with the same weights; data- and tensor-parallel ranks must agree.
            own_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
            random.seed(own_seed)
            numpy.random.seed(own_seed % 2**32)
            torch.manual_seed(own_seed)
            tensor_parallel.model_parallel_cuda_manual_seed(own_seed)
            yield Layout(
                rank=rank,
                world_size=world,
                tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
                tensor_size=parallel.tensor,
                pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
                pipeline_size=parallel.pipeline,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_size=parallel_state.get_data_parallel_world_size(),
                device=torch.device("cuda", local) if gpu else torch.device("cpu"),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def broadcast_from_last_stage(value: object) -> object:
    """Give every pipeline rank the last stage's Python object (metrics, small lists)."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(
        box,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return box[0]


def sum_over_data_parallel(values: dict[str, float]) -> dict[str, float]:
    """Add numbers over data-parallel ranks; every model-parallel rank must hold the same."""
    names = sorted(values)
    flat = torch.tensor([values[name] for name in names], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(flat, group=parallel_state.get_data_parallel_group())
    return dict(zip(names, flat.tolist(), strict=True))


def max_over_data_parallel(value: float) -> float:
    """The largest of the data-parallel ranks' numbers."""
    largest = torch.tensor(value, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return largest.item()


def max_over_ranks(values: list[float]) -> list[float]:
    """The largest of all ranks' numbers at each place. One that is not finite counts as infinity: what a maximum makes
    of NaN differs between backends."""
    numbers = [value if math.isfinite(value) else math.inf for value in values]
    largest = torch.tensor(numbers, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather_over_data_parallel(items: list) -> list:
    """The data-parallel ranks' lists, joined in rank order."""
    parts: list[list] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    dist.all_gather_object(parts, items, group=parallel_state.get_data_parallel_group())
    return [item for part in parts for item in part]


def gather_over_ranks(value: object) -> list:
    """Every rank's Python object, in rank order."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts
