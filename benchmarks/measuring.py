"""How every benchmark measures: variants in turn in one process, ratios pair by pair, peak memory in a process alone.

A benchmark prints JSON lines and nothing else, each through ``emit``. Seconds of one run mean little on a machine that
others use too; a ratio of two things measured within moments of each other does, and its spread says how much.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def timed(step: Callable[[], object]) -> float:
    """Seconds of one call, with what it left running on the GPU."""
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def alternately(variants: dict[str, Callable[[], object]], pairs: int = 5) -> dict[str, list[float]]:
    """Seconds of each variant: one warm-up each, then all in turn ``pairs`` times, every other time in reverse order.

    The order alternates so that a machine that slows down or speeds up favours none.
    """
    for step in variants.values():
        timed(step)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for pair in range(pairs):
        for name in reversed(variants) if pair % 2 else variants:
            seconds[name].append(timed(variants[name]))
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """How many times ``over`` took what ``under`` took: median and range over the pairs; and both medians."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    found = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    found = {key: round(value, 3) for key, value in found.items()}
    for name in (over, under):
        found[f"{name}_seconds"] = round(statistics.median(seconds[name]), 6)
    return found


def emit(benchmark: str, **values: object) -> None:
    """Print one JSON line, with what it ran on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    line = {"benchmark": benchmark, **values, "device": device, "threads": torch.get_num_threads()}
    print(json.dumps(line), flush=True)


def resident_peak() -> float:
    """The peak so far in MiB, of the GPU's memory or the process's. Not getrusage: its peak outlives fork and exec."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10


def peak_beyond(step: Callable[[], object]) -> float:
    """MiB that one call needs at its peak, beyond what is held before it; in a process that ``peak_mib`` started."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = resident_peak()
    step()
    return resident_peak() - before


def peak_mib(script: str, arguments: Sequence[str]) -> float:
    """What ``python script arguments`` prints last: the peak of a process whose memory nothing else has touched.

    The script prints ``peak_beyond`` of what it measures, or the difference of ``resident_peak()`` after and before.
    """
    # Memory freed before the measurement goes back to the system: kept, it would be used again and not counted.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", **returned}
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout
    return round(float(output.splitlines()[-1]), 1)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
