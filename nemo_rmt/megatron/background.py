"""Writing checkpoints in the background, with processes that never outlive this one."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Iterator, MutableMapping
from multiprocessing.managers import SyncManager
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, PersistentAsyncCaller
from torch import Tensor

from nemo_rmt import stopping
from nemo_rmt.manifest import FileRecord
from nemo_rmt.megatron.cpu import cuda_on_cpu
from nemo_rmt.megatron.writing import mended_writers, write_and_hash
from nemo_rmt.process import die_with_parent


class BackgroundWriter:
    """Megatron's persistent writer process, one per rank. All methods but ``abort`` are collective."""

    def __init__(self):
        self.queue = AsyncCallsQueue(persistent=True)
        self.manager: SyncManager | None = None

    @contextlib.contextmanager
    def collecting_results(self) -> Iterator[MutableMapping[str, FileRecord]]:
        """A block in which ``dist_checkpointing.save`` prepares a request for this writer.

        Yields what will have the checksums of this rank's shards, by name, once they are written: for ``schedule``.
        The results come back through a process that Megatron 0.16 starts too, and leaves running after a SIGKILL.
        """
        if self.manager is None:
            self.manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            self.manager.start(initializer=_serve, initargs=(os.getpid(),))
        results = self.manager.Queue()
        with mock.patch.object(filesystem_async, "_get_write_results_queue", lambda *a, **k: results):
            yield self.manager.dict()

    def schedule(self, request: AsyncRequest, hashed: MutableMapping[str, FileRecord]) -> None:
        """Start writing; returns once the tensors are copied off the GPU."""
        if request.async_fn is not None:  # None: this rank has nothing to write
            request = request._replace(async_fn=functools.partial(write_and_hash, request.async_fn, hashed))
        with mock.patch.object(PersistentAsyncCaller, "async_loop", _write_until_done):
            self.queue.schedule_async_request(request)

    def poll(self, *, wait: bool) -> None:
        """Complete the saves that every rank has written; with ``wait`` all of them."""
        self.queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        """Wait for all saves and end the processes."""
        self.queue.close()
        self._end_helpers()

    def abort(self) -> None:
        """End the processes, whatever they are doing. Not collective."""
        self.queue.close(abort=True)
        self._end_helpers()

    def _end_helpers(self) -> None:
        self.queue.persistent_caller = None  # its destructor asks for the rank: not after the process group's end
        if self.manager is not None:
            self.manager.shutdown()
            self.manager = None


def _serve(parent: int) -> None:
    """Begin a process that works for ``parent`` alone."""
    die_with_parent(parent)
    stopping.ignore()


def _write_until_done(*arguments: Any) -> None:
    """The writer process."""
    _serve(multiprocessing.parent_process().pid)
    with cuda_on_cpu(), mended_writers():
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
