"""How the nodes of a job step find each other and agree: small files in a folder that all of them see.

The leader writes ``call_K.json`` for each stage to start and ``call_K.stop`` to end its ranks; a follower answers with
``call_K.node_N.json``. ``over`` ends the meeting. Nothing here needs the nodes to see each other's processes.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_rmt.errors import UserError
from nemo_rmt.launch.placement import Placement
from nemo_rmt.run_folder import write_json

ARRIVAL_S = 60.0
"""Seconds the nodes wait for each other at the start: file systems may show a new file late."""
LEAVING_S = 15.0
"""Seconds the leader waits for the followers to end their ranks, and to leave."""


@dataclass(frozen=True)
class Call:
    """A stage that every node is to start its ranks of."""

    stage_yaml: str
    address: str
    port: int


@dataclass(frozen=True)
class Report:
    """What became of a follower's ranks."""

    ended: dict[str, int]
    """Exit status of those that ended by themselves, by rank."""
    over: bool
    """None of them runs any more."""


class Meeting:
    """The leader's side. Alone on one node there is nobody to meet, and nothing is written."""

    def __init__(self, run_dir: Path, placement: Placement):
        self.run_dir = run_dir
        self.placement = placement
        self.folder = _folder(run_dir, placement)
        self.followers = range(1, placement.nodes)
        self.calls = 0

    @contextmanager
    def open(self) -> Iterator[Meeting]:
        """Wait for the other nodes, and dismiss them at the end. Raises UserError when one does not come."""
        if not self.followers:
            yield self
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            (self.folder / "leader").touch()
            self._gather()
            yield self
        finally:
            (self.folder / "over").touch()
            _wait(lambda: not any(self.folder.glob("node_*")), LEAVING_S, self.placement.poll_s)
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder.parent, self.run_dir):
                try:
                    folder.rmdir()
                except OSError:
                    break  # another step meets there, or the run has begun

    def _gather(self) -> None:
        arrived: dict[int, dict[str, str]] = {}

        def complete() -> bool:
            for node in set(self.followers) - set(arrived):
                if (note := _read(self.folder / f"node_{node}")) is not None:
                    arrived[node] = note
            return len(arrived) == len(self.followers)

        if not _wait(complete, ARRIVAL_S, self.placement.poll_s):
            missing = ", ".join(str(node) for node in self.followers if node not in arrived)
            raise UserError(
                f"run_dir={self.run_dir}: of {self.placement.nodes} nodes, number {missing} did not show up "
                f"there within {ARRIVAL_S:.0f} s: run_dir must be on a file system that all nodes share, and nemo-rmt "
                "must be started on each of them (srun --ntasks-per-node=1)"
            )
        for note in arrived.values():
            if note["error"]:
                raise UserError(f"node {note['name']}: {note['error']}")

    def call(self, stage_yaml: Path) -> Call:
        """Ask every node for its ranks of a stage."""
        call = Call(str(stage_yaml.absolute()), self.placement.address, _free_port())
        if self.followers:
            write_json(self.folder / f"call_{self.calls}.json", asdict(call))
        self.calls += 1
        return call

    def stop(self) -> None:
        """Ask every node to end its ranks of the last call."""
        if self.followers:
            (self.folder / f"call_{self.calls - 1}.stop").touch()

    def ended(self) -> dict[int, int]:
        """Exit status of the other nodes' ranks that ended by themselves."""
        return {int(rank): status for report in self._reports() for rank, status in report.ended.items()}

    def wait_until_over(self) -> None:
        """Wait until no other node has ranks of the last call, LEAVING_S at most."""

        def over() -> bool:
            return sum(report.over for report in self._reports()) == len(self.followers)

        _wait(over, LEAVING_S, self.placement.poll_s)

    def _reports(self) -> list[Report]:
        notes = (_read(self.folder / f"call_{self.calls - 1}.node_{node}.json") for node in self.followers)
        return [Report(**note) for note in notes if note is not None]


class Seat:
    """A follower's side."""

    def __init__(self, run_dir: Path, placement: Placement):
        self.placement = placement
        self.run_dir = run_dir
        self.folder = _folder(run_dir, placement)
        self.note = self.folder / f"node_{placement.node}"

    def take(self, error: str) -> None:
        """Arrive; error: why this node cannot take part, or empty. Raises UserError when the leader is not there."""
        if not _wait((self.folder / "leader").exists, ARRIVAL_S, self.placement.poll_s):
            raise UserError(
                f"run_dir={self.run_dir}: node {self.placement.name} sees nothing there of the node that leads, after "
                f"{ARRIVAL_S:.0f} s: run_dir must be on a file system that all nodes share"
            )
        write_json(self.note, {"name": self.placement.name, "error": error})

    def calls(self) -> Iterator[tuple[int, Call]]:
        """The leader's calls, until the meeting is over."""
        number = 0
        while not self.is_over():
            if (note := _read(self.folder / f"call_{number}.json")) is None:
                time.sleep(self.placement.poll_s)
                continue
            yield number, Call(**note)
            number += 1

    def is_over(self) -> bool:
        """Whether the leader has dismissed the others, or taken the folder away."""
        return (self.folder / "over").exists() or not (self.folder / "leader").exists()

    def is_stopped(self, number: int) -> bool:
        """Whether the ranks of a call are to be ended."""
        return (self.folder / f"call_{number}.stop").exists() or self.is_over()

    def report(self, number: int, ended: dict[int, int], *, over: bool) -> None:
        """Say what became of this node's ranks."""
        report = Report({str(rank): status for rank, status in ended.items()}, over)
        write_json(self.folder / f"call_{number}.node_{self.placement.node}.json", asdict(report))

    def leave(self) -> None:
        """Go."""
        self.note.unlink(missing_ok=True)


def _folder(run_dir: Path, placement: Placement) -> Path:
    return run_dir.absolute() / ".nodes" / (placement.step or "alone")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there yet, or not whole yet


def _wait(condition: Callable[[], bool], limit_s: float, poll_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(poll_s)
    return met


def _free_port() -> int:
    """One that rank 0 can listen on. It is free again at once: a port that is taken in between fails the start."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
