"""Notices that a stage no longer gets on, and which rank is to blame."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_rmt import pulse


@dataclass(frozen=True)
class Hang:
    """A stage that stands still."""

    rank: int
    """The rank to blame."""
    reason: str


class Watchdog:
    """Reads the beats of all ranks.

    Args:
        folder: with the beats. world_size: ranks. limit_s: seconds without progress of any of them.
        clock: seconds, of this process: the nodes' clocks are not compared.
    """

    def __init__(self, folder: Path, world_size: int, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self.folder, self.world_size, self.limit_s, self.clock = folder, world_size, limit_s, clock
        self.interval_s = pulse.beat_interval(limit_s)
        now = clock()
        self.beats: dict[int, pulse.Beat] = {}
        self._looked = self._progressed = now
        self._beaten = dict.fromkeys(range(world_size), now)

    def read(self) -> dict[int, pulse.Beat]:
        """The last beat of every rank that has had one."""
        now = self.clock()
        for rank, beat in pulse.read(self.folder, self.world_size).items():
            before = self.beats.get(rank)
            if before is None or (beat.pid, beat.progress) != (before.pid, before.progress):
                self._progressed = now
            if before is None or (beat.pid, beat.beats) != (before.pid, before.beats):
                self._beaten[rank] = now
            self.beats[rank] = beat
        return self.beats

    def look(self) -> Hang | None:
        """Once per interval: whether no rank has progressed for the limit."""
        now = self.clock()
        if now - self._looked < self.interval_s:
            return None
        self._looked = now
        self.read()
        return self._blame(now) if now - self._progressed >= self.limit_s else None

    def _blame(self, now: float) -> Hang:
        """A rank that no longer beats is stopped or dead; else the one furthest behind keeps the others waiting."""
        silent = min(self._beaten, key=self._beaten.__getitem__)
        if now - self._beaten[silent] >= self.limit_s / 2:
            beat = self.beats.get(silent)
            last = f", last at {beat.doing!r}" if beat else " since it was started"
            where = f"rank {silent} (node {beat.node})" if beat else f"rank {silent}"
            return Hang(silent, f"{where} has not responded for {now - self._beaten[silent]:.0f} s{last}")
        behind = min(self.beats, key=lambda rank: self.beats[rank].progress)
        return Hang(
            behind,
            f"no rank has made progress for {now - self._progressed:.0f} s (cluster.hang_timeout_s={self.limit_s:g}): "
            f"rank {behind} (node {self.beats[behind].node}) is furthest behind, at {self.beats[behind].doing!r}",
        )
