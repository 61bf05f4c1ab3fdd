"""Signs of life: every rank says every few seconds that it is there, how far it is and what it is doing.

A file per rank, in a folder that the process which watches them sees, on whatever node it is. A rank that is stopped or
dead says nothing more; one that waits for another goes on beating and makes no progress. Standard library only, so that
everything may count its progress.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BEATS = Path("log") / "beats"
"""Where the ranks leave their signs of life, in the stage's folder."""
BEATS_WITHIN_LIMIT = 20

_progress = 0
_doing = "starting"


@dataclass
class Beat:
    """What a rank last said."""

    pid: int
    node: str
    beats: int
    """Counts up as long as the process runs."""
    progress: int
    """Counts what was done: micro-batches, sampled tokens, documents."""
    doing: str
    failure: str | None = None
    """Why the rank is about to end."""
    failed_at: float | None = None
    """Unix seconds of the failure, by the rank's own clock."""


def tick(doing: str | None = None) -> None:
    """Count one piece of work as done. doing: what comes next, for whoever reads about a hang."""
    global _progress, _doing
    _progress += 1
    _doing = doing or _doing


def beat_interval(limit_s: float) -> float:
    """Seconds between two beats of a rank whose stage may stand still for ``limit_s``."""
    return min(max(limit_s / BEATS_WITHIN_LIMIT, 0.2), 15.0)


class Pulse(threading.Thread):
    """Writes this rank's beats, from its own thread, until the process ends.

    Args:
        folder: where every rank of the stage writes. rank: this one. interval_s: seconds between beats.
    """

    def __init__(self, folder: Path, rank: int, interval_s: float):
        super().__init__(name="pulse", daemon=True)
        self.path = folder / f"rank_{rank}.json"
        self.interval_s = interval_s
        self.beat = Beat(os.getpid(), os.environ.get("SLURMD_NODENAME") or os.uname().nodename, 0, 0, _doing)
        self.lock = threading.Lock()

    def run(self) -> None:
        """Beat for ever."""
        while True:
            self._write()
            time.sleep(self.interval_s)

    def fail(self, reason: str) -> None:
        """Leave the reason why this rank ends, before its peers notice that it is gone. The first one counts."""
        if self.beat.failure is None:
            self.beat.failed_at = time.time()
            self.beat.failure = " ".join(reason.split())
            self._write()

    def _write(self) -> None:
        with self.lock:
            self.beat.beats += 1
            self.beat.progress, self.beat.doing = _progress, _doing
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(asdict(self.beat)), encoding="utf-8")
            except OSError:
                pass  # a full disk: who needs room for the work itself fails with the reason


def start(folder: Path, rank: int, interval_s: float) -> Pulse:
    """Start this rank's pulse."""
    pulse = Pulse(folder, rank, interval_s)
    pulse.start()
    return pulse


def read(folder: Path, world_size: int) -> dict[int, Beat]:
    """The last beat of every rank that has one. A file that is being written is left out."""
    beats = {}
    for rank in range(world_size):
        try:
            beats[rank] = Beat(**json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return beats
