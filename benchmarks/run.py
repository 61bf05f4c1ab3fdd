"""Run the benchmarks one after the other and write their results as JSON lines, tables and a figure.

``make bench``, or ``python benchmarks/run.py [NAMES...]``, about half an hour on two idle cores (``--quick``: five
minutes). In the folder of ``--output`` are then results.jsonl, of which the first line is the machine, RESULTS.md,
cost_curves.png, and what each benchmark said besides in NAME.log. One that fails does not stop the others; the exit
status is 1.

Every process gets all the cores that this one may use as threads, which is what training gets: one process works at a
time. Where a benchmark starts several at once it gives each one thread itself.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from tables import Line, markdown, plot_curves

HERE = Path(__file__).parent
BENCHMARKS: dict[str, list[str]] = {
    "logprob_head": [],
    "rmt_step": [],
    "rollout": [],
    "packing": [],
    "remit_step": [],
    "grpo_trl": [],
    "checkpoint": [],
    "train_step": [],
    "cost_curves": [],
    "flywheel_parts": [],
}
"""In this order, with these arguments."""


def machine() -> Line:
    """What the benchmarks run on."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        "commit": commit or None,
    }


def about(name: str) -> str:
    """The first line of a benchmark's docstring."""
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())).splitlines()[0]


def run(name: str, arguments: list[str], log: Path, threads: int) -> tuple[list[Line], int]:
    """One benchmark's lines, printed as they come, and its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    if not torch.cuda.is_available():
        environment["TORCH_COMPILE_DISABLE"] = (
            "1"  # Megatron's fused functions, which would be compiled by a C++ compiler
        )
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    shown = " ".join(["python", f"benchmarks/{name}.py", *arguments])
    lines = []
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        for text in process.stdout:
            print(text, end="", flush=True)
            lines.append({"command": shown, **json.loads(text)})
    return lines, process.returncode


def main() -> None:
    """Run what was asked for; exit with 1 when any of it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smallest shapes: do they run?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every process")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    where, lines, failed = machine(), [], []
    names = options.names or list(BENCHMARKS)
    with (options.output / "results.jsonl").open("w") as results:
        print(json.dumps(where), file=results, flush=True)
        for index, name in enumerate(names):
            print(f"[{index + 1}/{len(names)}] {name}", flush=True)
            began, log = time.monotonic(), options.output / f"{name}.log"
            arguments = [*BENCHMARKS[name], *(["--quick"] if options.quick else [])]
            found, status = run(name, arguments, log, options.threads)
            for line in found:
                print(json.dumps(line), file=results, flush=True)
            lines += found
            print(f"[{index + 1}/{len(names)}] {name}: {time.monotonic() - began:.0f} s", flush=True)
            if status:
                failed.append(f"{name} exited {status}: see {log}")
    (options.output / "RESULTS.md").write_text(markdown(where, lines, {name: about(name) for name in names}))
    if any(line["benchmark"] == "cost_curves" for line in lines):
        plot_curves(lines, options.output / "cost_curves.png")
    print(f"results: {options.output}/RESULTS.md")
    for failure in failed:
        print(failure, file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
