"""The sending half of weight transfer, between threads instead of a trainer and vLLM."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rmt.rollout.vllm.transfer import GlooGroup, GlooSender, TransferFailed, WeightMeta, WeightStream, own_address

EXPECTED = [WeightMeta("first", torch.float32, (3, 2)), WeightMeta("second", torch.bfloat16, (5,))]


def tensors() -> Iterator[tuple[str, Tensor]]:
    yield "first", torch.arange(6.0).reshape(3, 2)
    yield "second", torch.ones(5, dtype=torch.bfloat16)


class Workers:
    """A server's workers as threads. receive: replaces how one receives."""

    def __init__(self, count: int = 2, receive: Callable[[GlooGroup, dict[str, Any]], None] | None = None):
        self.count, self.calls, self.received = count, [], [{} for _ in range(count)]
        self.groups: list[GlooGroup] = []
        self.receive = receive

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.calls.append("init")
        assert listeners(info["port"]) == {info["address"]}
        limit = timedelta(seconds=info["timeout_s"])

        def join(rank: int) -> GlooGroup:
            store = dist.TCPStore(info["address"], info["port"], info["size"], wait_for_workers=False, timeout=limit)
            return GlooGroup(store, rank, info["size"], info["address"], info["timeout_s"])

        self.groups = in_threads(join, range(1, self.count + 1))

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, info: dict[str, Any]) -> None:
        self.calls.append("update")
        in_threads(lambda rank: self._receive(rank, info), range(self.count))

    def _receive(self, rank: int, info: dict[str, Any]) -> None:
        if self.receive is not None:
            self.receive(self.groups[rank], info)
            return
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            self.received[rank][name] = tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.groups[rank].broadcast(tensor)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


def in_threads(call: Callable[[int], Any], arguments: range) -> list[Any]:
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda each=each: results.update({each: call(each)})) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results.get(each) for each in arguments]


def listeners(port: int) -> set[str]:
    """IPv4 addresses on which this node listens at a port; "any6" for every IPv6 one."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        host, listening = address.split(":")
        if state == "0A" and int(listening, 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(host)[::-1]))
    for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]:
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port:
            found.add("any6")
    return found


def connected(workers: Workers, timeout_s: float = 30) -> GlooSender:
    source = WeightStream(EXPECTED)
    return GlooSender.connect(workers, source, workers=workers.count, address="127.0.0.1", timeout_s=timeout_s)


def test_every_worker_gets_every_tensor_of_every_version():
    workers = Workers()
    sender = connected(workers)
    for _ in range(3):
        workers.received = [{}, {}]
        sender.source.tensors = tensors()
        sender.send_weights()
        for received in workers.received:
            assert {name: tensor.tolist() for name, tensor in received.items()} == {
                name: tensor.tolist() for name, tensor in tensors()
            }
    assert workers.calls == ["init"] + ["start", "update", "finish"] * 3


def test_tensors_are_taken_one_at_a_time_as_the_workers_get_them():
    workers = Workers(1)
    sender = connected(workers)
    seen = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors():
            seen.append(len(workers.received[0]))
            yield name, tensor

    sender.source.tensors = stream()
    sender.send_weights()
    assert seen == sorted(seen) and seen[0] < 2


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([("first", torch.zeros(3, 2))], "ends before second"),
        ([("second", torch.zeros(5))], "instead of"),
        ([("first", torch.zeros(2, 3))], "instead of"),
        ([("first", torch.zeros(3, 2, dtype=torch.float64))], "instead of"),
        ([*tensors(), ("third", torch.zeros(1))], "third.*instead of None"),
    ],
)
def test_a_stream_other_than_announced_is_refused(stream, message):
    with pytest.raises(ValueError, match=message):
        list(WeightStream(EXPECTED, stream))


def test_workers_that_do_not_come_are_not_waited_for_longer_than_the_limit():
    workers = Workers()
    workers.init_weight_transfer_engine = lambda info: time.sleep(20)
    start = time.monotonic()
    with pytest.raises(TransferFailed):
        connected(workers, timeout_s=1)
    assert time.monotonic() - start < 8


def test_a_server_that_refuses_to_connect_is_believed_at_once():
    workers = Workers()

    def refuse(info: dict[str, Any]) -> None:
        raise ConnectionError("no such backend")

    workers.init_weight_transfer_engine = refuse
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no such backend"):
        connected(workers)
    assert time.monotonic() - start < 3


def test_a_worker_that_stops_receiving_fails_the_transfer_within_the_limit():
    workers = Workers(1, receive=lambda group, info: time.sleep(20))
    sender = connected(workers, timeout_s=1)
    big = torch.zeros(64_000_000)  # more than sockets buffer
    sender.source = WeightStream([WeightMeta("first", torch.float32, tuple(big.shape))], [("first", big)])
    start = time.monotonic()
    with pytest.raises(TransferFailed):
        sender.send_weights()
    assert time.monotonic() - start < 10


def test_the_address_is_that_of_the_way_to_the_server():
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") in ("127.0.0.1", "::1")
