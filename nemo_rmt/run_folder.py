"""The run folder: its paths, atomic writes, durable state, complete checkpoints, lock and disk checks.

Standard library only: the flywheel, the stages and the report all read run folders.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_rmt.errors import UserError

logger = logging.getLogger(__name__)

LOCK_WAIT_S = 20.0
"""Seconds a start waits for the workers of a killed one to disappear."""
METADATA = "manifest.json"
_STEP = re.compile(r"step_(\d{8})")


@dataclass
class StageRecord:
    """What state.json says about one stage of one iteration."""

    status: str = "pending"
    """pending, running, done or failed. An interrupted stage is pending (or still running, after SIGKILL)."""
    checkpoint: str | None = None
    """Final checkpoint relative to the run folder, once done."""
    started: float | None = None
    """Unix seconds of the first attempt's start."""
    finished: float | None = None
    """Unix seconds of the end, done or failed."""
    attempts: int = 0
    """Starts that led to the present contents of the stage's folder."""
    id: str | None = None
    """Identity of those contents: new whenever the stage begins from nothing."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Identity of each input, by role, that those contents were made from."""


@dataclass
class State:
    """state.json."""

    recipe: str
    """Digest of the recipe's keys that decide the results."""
    iterations: list[dict[str, StageRecord]] = field(default_factory=list)
    """One mapping of stage name to record per turn of the flywheel."""

    def record(self, iteration: int, stage: str) -> StageRecord:
        """The record of a stage, made if it is not there yet."""
        while len(self.iterations) <= iteration:
            self.iterations.append({})
        return self.iterations[iteration].setdefault(stage, StageRecord())


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "flywheel.yaml"

    @property
    def state_path(self) -> Path:
        """The durable state."""
        return self.path / "state.json"

    @property
    def report_path(self) -> Path:
        """The report's page."""
        return self.path / "report" / "index.html"

    def stage_dir(self, iteration: int, stage: str) -> Path:
        """Folder of one stage."""
        return self.path / f"iteration_{iteration:03d}" / stage

    def relative(self, path: Path) -> str:
        """A path inside the run, relative to it, as job inputs and results hold it."""
        return path.resolve().relative_to(self.path.resolve()).as_posix()

    def result(self, iteration: int, stage: str) -> dict[str, Any] | None:
        """The stage's result.json if it is there, whole and says done."""
        try:
            result = json.loads((self.stage_dir(iteration, stage) / "result.json").read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return None
        return result if result.get("status") == "done" else None

    def load_state(self) -> State | None:
        """state.json, or None if this run has not started. Raises UserError when it is damaged."""
        try:
            raw = json.loads(self.state_path.read_text())
            iterations = [{name: StageRecord(**record) for name, record in each.items()} for each in raw["iterations"]]
            return State(raw["recipe"], iterations)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.state_path} is damaged ({error}): choose another run_dir") from error

    def save_state(self, state: State) -> None:
        """Write state.json atomically."""
        write_json(self.state_path, asdict(state))

    def discard(self, iteration: int, stage: str) -> None:
        """Delete a stage's folder. Its result goes first: a deletion cut short must not look done."""
        folder = self.stage_dir(iteration, stage)
        (folder / "result.json").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)

    @contextmanager
    def lock(self, wait_s: float = LOCK_WAIT_S) -> Iterator[int]:
        """Hold RUN/.lock and yield its file descriptor, which workers inherit.

        The lock is free only once every process holding it has ended, so a start after SIGKILL waits for
        the workers it left. Raises UserError when the holder is still there after ``wait_s`` seconds.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + wait_s
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
                    raise UserError(
                        f"run_dir={self.path} is in use by another nemo-rmt (process {holder}): wait for it, stop it, "
                        "or choose another run_dir"
                    )
                time.sleep(0.1)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class CheckpointInfo:
    """manifest.json of a complete checkpoint."""

    folder: Path
    stage: str
    iteration: int
    step: int
    model: dict[str, Any]
    vocab_size: int
    tokenizer: str
    """SHA-256 fingerprint of the tokenizer."""
    files: dict[str, int]
    """Size in bytes of every file, by name relative to the folder."""


def inspect_checkpoint(folder: Path) -> CheckpointInfo:
    """What a checkpoint says about itself, after comparing its files with its manifest.

    Raises UserError when it is missing, not a checkpoint, or a file is missing or has another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    try:
        raw = json.loads((folder / METADATA).read_text())
        if raw["format"] != 1:
            raise UserError(f"checkpoint {folder} has format {raw['format']}, this version reads format 1")
        keys = ("stage", "iteration", "step", "model", "vocab_size", "tokenizer", "files")
        info = CheckpointInfo(folder, **{key: raw[key] for key in keys})
    except FileNotFoundError:
        steps = sorted([*folder.glob("step_*"), *folder.glob("checkpoints/step_*")])
        hint = f"; it holds checkpoints, give one of them, for example {steps[-1]}" if steps else ""
        raise UserError(f"{folder} is not a complete checkpoint: it has no {METADATA}{hint}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: cannot read {METADATA} ({error!r})") from None
    for name, size in info.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint {folder} is truncated: {name} is missing")
        if path.stat().st_size != size:
            raise UserError(
                f"checkpoint {folder} is truncated: {name} has {path.stat().st_size} bytes instead of {size}"
            )
    return info


def latest_checkpoint(stage_dir: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None. Damaged ones are passed over with a warning."""
    folders = [path for path in (Path(stage_dir) / "checkpoints").glob("step_*") if _STEP.fullmatch(path.name)]
    for folder in sorted(folders, reverse=True):
        try:
            inspect_checkpoint(folder)
        except UserError as error:
            logger.warning("%s; continuing from the one before", error)
        else:
            return folder
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers and a crash see the old contents or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinity are refused (ValueError): other readers do not take them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_writable(path: Path) -> None:
    """Raise UserError unless files can be written at ``path``, which need not exist; leaves nothing behind."""
    existing = nearest_existing(path)
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        with tempfile.TemporaryDirectory(prefix=".nemo-rmt-", dir=existing) as probe:
            (Path(probe) / "probe").write_bytes(b"0" * 4096)
    except OSError as error:
        raise UserError(f"run_dir={path} is not writable ({error}): choose another run_dir") from error


def check_space(path: Path, needed: int) -> None:
    """Raise UserError unless the file system of ``path`` has ``needed`` bytes free."""
    free = shutil.disk_usage(nearest_existing(path)).free
    if free < needed:
        raise UserError(
            f"run_dir={path} has {_size(free)} free, the run needs about {_size(needed)}: free some space, "
            "lower flywheel.keep_checkpoints or choose another run_dir"
        )


def nearest_existing(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    path = Path(path).absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
