"""Where a stage's time goes, by part: ``with part("data"): ...`` around the work, wherever it is done.

Costs next to nothing until ``stage`` asks for it. One per process, like the pulse: what is measured is the thread that
asked, on rank 0. Imports torch only then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Part = Literal["data", "rollout", "scoring", "forward_backward", "optimizer", "sync", "checkpoint", "logging"]

FOLDER = Path("profile")
PARTS, TABLE, TRACE = FOLDER / "parts.json", FOLDER / "parts.txt", FOLDER / "trace.json.gz"
"""What is left in the stage's folder."""
WARM_UP, TRACED = 3, 2
"""Steps before the trace, in which caches fill and kernels are chosen, and steps in it."""

_NOTHING = contextlib.nullcontext()
_profile: _Profile | None = None


def part(name: Part) -> contextlib.AbstractContextManager[None]:
    """A block whose time counts to a part of the step; a part inside another counts to the inner one alone."""
    if _profile is None or threading.get_ident() != _profile.thread:
        return _NOTHING
    return _profile.part(name)


def step() -> None:
    """The next step begins."""
    if _profile is not None:
        _profile.step()


@contextlib.contextmanager
def stage(folder: Path, title: str, *, enabled: bool) -> Iterator[None]:
    """Profile the block, the whole work of a stage, and write where its time went, even if it fails.

    folder: the stage's. title: on the terminal. enabled: False leaves everything as it is.

    What goes wrong in profiling itself is logged and ends the profile, not the stage.
    """
    global _profile
    if not enabled:
        yield
        return
    _profile = _Profile(folder)
    try:
        yield
    finally:
        profile, _profile = _profile, None
        try:
            profile.write(title)
        except Exception:  # a full disk, a profiler without permission: the stage's own work is done
            logger.exception("%s: the profile could not be written", title)


class _Profile:
    """Seconds of one process by part, from its start, and a trace of a few steps in ``folder``."""

    def __init__(self, folder: Path):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints two lines at each trace
        import torch

        self.torch = torch
        self.folder = folder
        self.thread = threading.get_ident()
        self.steps = 0
        self.started = process_age()
        self.seconds: dict[str, float] = {}
        """From the first step on; "other" is what no part counted."""
        self.before: dict[str, float] = {}
        """The same, before the first step."""
        self.within: list[str] = []
        self.at_work = False
        """Whether any part or step has begun."""
        self.trace: Any = None
        self.traced: list[int] = []
        self.mark = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self.at_work = True
        self.within.append(name)
        try:
            yield
        finally:
            self._charge()
            self.within.pop()

    def step(self) -> None:
        self._charge()
        ends, starts = self.trace is not None and len(self.traced) == TRACED, self.steps == WARM_UP
        if ends:
            self._guarded(self._end_trace)
        if starts:
            self._guarded(self._start_trace)
        if ends or starts:
            self._charge("profiler")
        self.steps, self.at_work = self.steps + 1, True
        if self.trace is not None:
            self.traced.append(self.steps)

    def write(self, title: str) -> None:
        """Write parts.json and parts.txt and say where they are."""
        self._charge()
        if self.trace is not None:
            self._guarded(self._end_trace)
            self._charge("profiler")
        before, seconds = dict(self.before), dict(self.seconds)
        before["start"] = self.started + before.get("start", 0.0)
        if self.steps:  # a stage without steps is at work from its first part on
            before["start"] += before.pop("other", 0.0)
        total = {name: before.get(name, 0.0) + seconds.get(name, 0.0) for name in {**before, **seconds}}
        found = {
            "title": title,
            "steps": self.steps - len(self.traced),
            "traced_steps": self.traced,
            "total_s": sum(total.values()),
            "seconds": dict(sorted(total.items(), key=lambda pair: -pair[1])),
            "before_first_step": before,
        }
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        (self.folder / PARTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (self.folder / TABLE).write_text(table(found), encoding="utf-8")
        print(f"[{title}] where the time went: {self.folder / TABLE}", flush=True)

    def _charge(self, name: str | None = None) -> None:
        """Count the time since the last call to ``name``, or to where the process is."""
        if self.torch.cuda.is_available() and self.torch.cuda.is_initialized():
            self.torch.cuda.synchronize()
        now = time.perf_counter()
        if name is None:  # a traced step takes longer than others: it is the profiler's
            outside = "other" if self.at_work else "start"
            name = "profiler" if self.trace is not None else self.within[-1] if self.within else outside
        ledger = self.seconds if self.steps else self.before
        ledger[name] = ledger.get(name, 0.0) + now - self.mark
        self.mark = now

    def _start_trace(self) -> None:
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        trace = self.torch.profiler.profile()
        trace.start()
        self.trace = trace

    def _end_trace(self) -> None:
        trace, self.trace = self.trace, None
        trace.stop()
        trace.export_chrome_trace(str(self.folder / TRACE))

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except Exception:
            self.trace = None
            logger.exception("torch.profiler failed: %s is missing", self.folder / TRACE)


def process_age() -> float:
    """Seconds since this process was started, to a hundredth."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name may have blanks
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - started)


def table(found: dict[str, Any]) -> str:
    """parts.json for people."""
    steps, total = found["steps"], found["total_s"]
    lines = [f"{found['title']}: {total:.1f} s from the start of its process on rank 0", ""]
    lines.append(f"{'part':<18}{'seconds':>10}{'share':>9}")
    if steps:
        lines[0] += f", {steps} steps"
        lines[-1] += f"{'before step 1':>16}{'ms per step':>14}"
    for name, seconds in found["seconds"].items():
        lines.append(f"{name:<18}{seconds:>10.2f}{seconds / total:>9.1%}")
        if steps and name not in ("start", "profiler"):
            before = found["before_first_step"].get(name, 0.0)
            lines[-1] += f"{before:>16.2f}{1000 * (seconds - before) / steps:>14.2f}"
    lines += ["", "start: before the first step, what no part counts: imports, joining ranks, building the model."]
    if found["traced_steps"]:
        first, last = found["traced_steps"][0], found["traced_steps"][-1]
        lines.append(f"profiler: steps {first} to {last}, traced in {TRACE.name}, and writing it; in no other row.")
    return "\n".join(lines) + "\n"
