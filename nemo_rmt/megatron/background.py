"""Writing checkpoints in the background, with processes that never outlive this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, PersistentAsyncCaller
from torch import Tensor

from nemo_rmt.megatron.cpu import cuda_on_cpu
from nemo_rmt.process import die_with_parent


class BackgroundWriter:
    """Megatron's persistent writer process, one per rank. All methods but ``close`` are collective."""

    def __init__(self):
        self.queue = AsyncCallsQueue(persistent=True)
        self.manager: SyncManager | None = None

    @contextlib.contextmanager
    def collecting_results(self) -> Iterator[None]:
        """A block in which ``dist_checkpointing.save`` prepares a request for this writer.

        The results come back through a process that Megatron 0.16 starts too, and leaves running after a SIGKILL.
        """
        if self.manager is None:
            self.manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            self.manager.start(initializer=die_with_parent, initargs=(os.getpid(),))
        results = self.manager.Queue()
        with mock.patch.object(filesystem_async, "_get_write_results_queue", lambda *a, **k: results):
            yield

    def schedule(self, request: AsyncRequest) -> None:
        """Start writing; returns once the tensors are copied off the GPU."""
        with mock.patch.object(PersistentAsyncCaller, "async_loop", _write_until_done):
            self.queue.schedule_async_request(request)

    def poll(self, *, wait: bool) -> None:
        """Complete the saves that every rank has written; with ``wait`` all of them."""
        self.queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        """Wait for all saves and end the processes."""
        self.queue.close()
        if self.manager is not None:
            self.manager.shutdown()


def _write_until_done(*arguments: Any) -> None:
    """The writer process."""
    die_with_parent(multiprocessing.parent_process().pid)
    with cuda_on_cpu():
        PersistentAsyncCaller.async_loop(*arguments)


def copy_cpu_tensors(state: dict[str, Any]) -> None:
    """Replace the sharded tensors that lie in CPU memory by copies, in place.

    The writer process shares CPU memory with this one (Megatron 0.16 copies GPU tensors and views only): without
    copies it would write what the next training step makes of them.
    """

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase) and isinstance(leaf.data, Tensor) and leaf.data.device.type == "cpu":
            leaf.data = leaf.data.detach().clone()
        return leaf

    dict_list_map_inplace(copied, state)
