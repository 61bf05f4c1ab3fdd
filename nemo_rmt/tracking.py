"""Where a stage's numbers go: metrics.jsonl always, TensorBoard and W&B when asked, and progress on the terminal.

Imports torch only when TensorBoard is written: the report reads metrics with this module too.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_rmt.config import Tracking
from nemo_rmt.errors import UserError
from nemo_rmt.stopping import Stopped


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl in file order; [] without the file.

    A line that is not a complete object with a step (the last one, after SIGKILL) is left out. Values that were
    not finite are None.
    """
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in records if record is not None]


def _parse(line: str) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None for a torn one."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


SKIPPED, SAMPLES, WEIGHTS = "skipped.jsonl", "samples.jsonl", "weights.jsonl"
"""Files of steps beside metrics.jsonl: those that were skipped, what every step was made of, and a few rows of text
with the weight of each token."""


class Metrics:
    """Logs one stage's steps; use it as a context manager.

    >>> with Metrics(folder, recipe.tracking, title="0/anneal", total_steps=200, resume_step=100) as metrics:
    ...     metrics.log(101, {"train/loss": 1.2, "train/tokens_per_s": 18_200.0})

    On entry, metrics.jsonl keeps the steps up to resume_step (the checkpoint's) and loses what a killed run logged
    beyond it, so that a resumed run's file equals an uninterrupted one's; TensorBoard hides those steps too. The files
    of ``append`` likewise.
    """

    def __init__(
        self,
        folder: Path,
        tracking: Tracking,
        *,
        title: str,
        total_steps: int,
        resume_step: int = 0,
        enabled: bool = True,
    ) -> None:
        """folder: the stage's. title: on the terminal and in W&B. enabled: False on every rank but one."""
        self.folder, self.tracking, self.title = folder, tracking, title
        self.total_steps, self.resume_step, self.enabled = total_steps, resume_step, enabled
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._progress: _Bar | _Lines | None = None

    def __enter__(self) -> Metrics:
        if not self.enabled:
            return self
        if self.tracking.wandb_project:
            self._wandb = _start_wandb(self.folder, self.tracking.wandb_project, self.title)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _truncate(path, self.resume_step)
        for name in (SKIPPED, SAMPLES, WEIGHTS):
            if (self.folder / name).exists():
                _truncate(self.folder / name, self.resume_step)
        self._file = path.open("a", encoding="utf-8")
        if self.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.resume_step + 1)
        console = Console()
        bar = _Bar if console.is_terminal else _Lines
        self._progress = bar(console, self.title, self.total_steps, self.resume_step, self.tracking.log_interval)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self.enabled:
            return
        self._progress.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error_type in (None, Stopped) else 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the finished step (1-based). Names are ``group/name``; NaN and infinities become null in the file."""
        if not self.enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            # Unflushed events are lost on SIGKILL, and a resumed run does not write them again.
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        self._progress.show(step, values)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a step's record, with its "step", to SKIPPED, SAMPLES or WEIGHTS. What is not finite becomes null."""
        if not self.enabled:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def _truncate(path: Path, last_step: int) -> None:
    """Atomically leave only the complete lines of steps up to last_step."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= last_step]
    replacement = path.with_name(path.name + ".tmp")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _start_wandb(folder: Path, project: str, title: str) -> Any:
    """A W&B run that a resumed stage continues: its id is kept in the stage's folder."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"tracking.wandb_project={project} needs Weights & Biases: install nemo-rmt[wandb], or set "
            f"tracking.wandb_project=null"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(project=project, name=title, id=id_file.read_text().strip(), resume="allow", dir=str(folder))


class _Bar:
    """A progress bar, on a terminal."""

    def __init__(self, console: Console, title: str, total_steps: int, resume_step: int, _interval: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, total=total_steps, completed=resume_step, info="")
        self._progress.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step, info=_summary(values))

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """A plain line every few steps and at the last one, where a bar would fill a log file."""

    def __init__(self, console: Console, title: str, total_steps: int, resume_step: int, interval: int) -> None:
        self._file, self._title, self._total_steps, self._interval = console.file, title, total_steps, interval
        self._first_step, self._started = resume_step, time.monotonic()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        if step % self._interval and step != self._total_steps:
            return
        per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        parts = [f"[{self._title}] step {step}/{self._total_steps}", _summary(values)]
        if step < self._total_steps:
            parts.append(f"{_duration(per_step * (self._total_steps - step))} left")
        print(" ".join(part for part in parts if part), file=self._file, flush=True)

    def close(self) -> None:
        self._file.flush()


def _summary(values: Mapping[str, float]) -> str:
    """``loss 1.234 reward 0.41 18.2k tok/s``: whichever of them the step has."""
    parts = []
    if "train/loss" in values:
        parts.append(f"loss {values['train/loss']:.3f}")
    if "rl/reward_mean" in values:
        parts.append(f"reward {values['rl/reward_mean']:.3f}")
    if "train/tokens_per_s" in values:
        speed = values["train/tokens_per_s"]
        parts.append(f"{speed / 1000:.1f}k tok/s" if speed >= 1000 else f"{speed:.0f} tok/s")
    return " ".join(parts)


def _duration(seconds: float) -> str:
    """``0:12``, ``12:05`` or ``3:12:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
