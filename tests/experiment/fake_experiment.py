"""Experiments whose stages are fakes: how to start them, and what of them ran.

``python fake_experiment.py EXPERIMENT.yaml OUT JOBS`` is one worker, as a process of its own.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nemo_rmt.experiment import ExperimentOptions, run, run_experiment
from nemo_rmt.experiment.views import measured

FAKE = Path(__file__).with_name("fake_shared_stage.py")

BASE = {
    "about": "Which anneal is best?",
    "recipe": "tiny",
    "settings": {
        "data": {"corpora": [{"name": "programs", "kind": "chains"}]},
        "pretrain": {"steps": 20},
        "rmt": {"enabled": False},
        "sft": {"enabled": False},
    },
    "seeds": [1],
    "control": "uniform",
    "arms": {
        "uniform": {"about": "every token counts the same", "settings": {"anneal": {"objective": "uniform"}}},
        "remit": {"about": "the paper's", "settings": {"anneal": {"objective": "remit"}}},
        "sharp": {"about": "ReMiT, larger scale", "settings": {"anneal": {"remit": {"scale": 4.0}}}},
    },
    "metrics": [{"name": "iteration_1/lm/all/nll", "label": "nats per token", "higher_is_better": False}],
}


def write_experiment(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
    return path


def fake_command(stage_yaml: Path, lock: int) -> list[str]:
    return [sys.executable, str(FAKE), str(stage_yaml)]


def start(experiment: Path, out: Path, **options: Any) -> int:
    """Run an experiment in this process, with measured.json for results."""
    settings = ExperimentOptions(overrides=options.pop("overrides", []), out=out, **options)
    return run_experiment(str(experiment), settings, command=fake_command)


def write_measured(results: run.Results, whole: list) -> None:
    """In place of tables and plots."""
    found = [asdict(measured(cell, results.store)) for cell in whole]
    text = json.dumps([{**each, "folder": each["folder"].name} for each in found], indent=1)
    results.folder.mkdir(parents=True, exist_ok=True)
    (results.folder / "measured.json").write_text(text)


def ran(out: Path) -> list[str]:
    """The folders of the stages that ran since the last call."""
    path = out / "ran.txt"
    names = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def kinds(names: list[str]) -> dict[str, int]:
    """How many of each stage."""
    found = sorted(name.split("-")[0] for name in names)
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    run.Results.write = write_measured
    sys.exit(start(Path(sys.argv[1]), Path(sys.argv[2]), jobs=int(sys.argv[3])))
