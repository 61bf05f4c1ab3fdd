"""Weights on their way into a vLLM server: the sending half of vLLM's weight transfer.

The order of calls is that of vLLM's TrainerWeightTransferEngine (written against 0.32): `init_weight_transfer_engine`
once, then for every version `start_weight_update`, `update_weights` while the tensors are broadcast from rank 0 to all
vLLM workers, and `finish_weight_update`. On GPUs vLLM's own NCCL engine sends; vLLM has none for CPUs, so that gloo is
ours, in here and, for its receiving half, in worker.py. Imports no vLLM at the top.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rmt.rollout.vllm.background import in_background

SENDER = 0
REASON_WAIT_S = 5.0


class WeightMeta(NamedTuple):
    """A tensor that will be sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class WeightStream:
    """What vLLM calls a WeightSource. expected: in the order of the stream. tensors: whole, one at a time."""

    expected: list[WeightMeta]
    tensors: Iterable[tuple[str, Tensor]] = ()

    def metadata(self) -> list[WeightMeta]:
        """What iterating yields."""
        return self.expected

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Raises ValueError when the stream is not what was announced: a receiver would take it for something else."""
        expected = iter(self.expected)
        for name, tensor in self.tensors:
            meta = next(expected, None)
            got = WeightMeta(name, tensor.dtype, tuple(tensor.shape))
            if got != meta:
                raise ValueError(f"the stream of weights yields {got} instead of {meta}")
            yield name, tensor
        missing = next(expected, None)
        if missing is not None:
            raise ValueError(f"the stream of weights ends before {missing.name}")


class WeightRoutes(Protocol):
    """A server's control of weight transfer; vLLM's VLLMWeightSyncClient. Each raises when the server refuses."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Sender(Protocol):
    """The trainer's end of a connection to all vLLM workers."""

    source: WeightStream

    def send_weights(self) -> None:
        """Send what ``source`` streams and make the server use it."""

    def shutdown(self) -> None:
        """Leave; a transfer under way fails."""


class TransferFailed(Exception):
    """A peer is gone, or took too long."""


class GlooGroup:
    """A gloo group apart from the process's default one, bound to one address.

    Args:
        address: of this process, as the others reach it. Everything fails that takes longer than ``timeout_s``.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, address: str, timeout_s: float):
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        # The default is the host name's address: reachable from outside.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self.store = store
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """From the sender to everybody, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise TransferFailed(str(error).splitlines()[0]) from error


class GlooSender:
    """Sends over gloo. ``connect`` makes one."""

    def __init__(self, routes: WeightRoutes, source: WeightStream, group: GlooGroup):
        self.routes, self.source, self._group = routes, source, group

    @classmethod
    def connect(
        cls, routes: WeightRoutes, source: WeightStream, *, workers: int, address: str, timeout_s: float
    ) -> GlooSender:
        """Meet all workers of the server. address: of this process, as they reach it."""
        # Bound here: TCPStore itself would listen on every network of the node.
        listening = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listening.getsockname()[1]
        info = {"address": address, "port": port, "size": workers + 1, "timeout_s": timeout_s}
        group = _meet(
            lambda: routes.init_weight_transfer_engine(info),
            lambda: GlooGroup(
                dist.TCPStore(
                    address,
                    port,
                    workers + 1,
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=listening.detach(),
                    timeout=timedelta(seconds=timeout_s),
                ),
                SENDER,
                workers + 1,
                address,
                timeout_s,
            ),
        )
        return cls(routes, source, group)

    def send_weights(self) -> None:
        """See Sender."""
        metadata = self.source.metadata()
        info = {
            "names": [meta.name for meta in metadata],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metadata],
            "shapes": [list(meta.shape) for meta in metadata],
        }
        self.routes.start_weight_update()
        received = in_background(lambda: self.routes.update_weights(info))
        try:
            for _, tensor in self.source:
                if received.done():
                    break  # refused before all was sent
                self._group.broadcast(tensor)
        except TransferFailed:
            wait((received,), REASON_WAIT_S)
            if received.done():
                received.result()  # the server's own reason is the better one
            raise
        received.result()
        self.routes.finish_weight_update()

    def shutdown(self) -> None:
        """See Sender."""
        self._group = None


def connect_nccl(routes: WeightRoutes, source: WeightStream, *, workers: int) -> Sender:
    """Meet all workers of a server through vLLM's NCCL engine, on this process's CUDA device.

    The identity of the group goes over the server's guarded routes: vLLM's other way, a TCPStore, unpickles what it is
    sent there.
    """
    import base64

    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    identity = bytes(NCCLLibrary().ncclGetUniqueId())
    info = {
        "nccl_unique_id_b64": base64.b64encode(identity).decode(),
        "rank_offset": 1,
        "world_size": workers + 1,
        "packed": True,
    }
    device = torch.cuda.current_device()

    def join() -> Any:
        with torch.cuda.device(device):
            return uid_init_process_group(identity, SENDER, workers + 1, device)

    guarded = _AbortingRoutes(routes)
    engine = NCCLTrainerWeightTransferEngine(client=guarded, source=source, packed=True)
    engine.model_update_group = _meet(lambda: routes.init_weight_transfer_engine(info), join)
    guarded.abort = engine.shutdown
    return engine


class _AbortingRoutes:
    """Routes whose failed ``update_weights`` ends the communicator: a broadcast to a dead peer never ends by itself."""

    def __init__(self, routes: WeightRoutes):
        self.routes = routes
        self.abort: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.routes, name)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.routes.update_weights(update_info)
        except BaseException:
            self.abort()
            raise


def own_address(server: str) -> str:
    """This node's address on the way to a server, which can thus reach it there."""
    family, kind, protocol, _, address = socket.getaddrinfo(server, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # chooses a route; a datagram socket sends nothing for it
        return probe.getsockname()[0]


def _meet(invite: Callable[[], None], join: Callable[[], Any]) -> Any:
    """Join a group while the server is told to; its refusal ends the wait."""
    invited, joined = in_background(invite), in_background(join)
    wait((invited, joined), return_when=FIRST_EXCEPTION)
    if invited.done():
        invited.result()
    try:
        return joined.result()
    except RuntimeError as error:  # DistNetworkError, DistStoreError and NCCL's
        raise TransferFailed(str(error).splitlines()[0]) from error
