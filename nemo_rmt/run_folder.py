"""The run folder: its paths, atomic writes, durable state, lock and disk checks.

Standard library only: the flywheel, the stages and the report all read run folders.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_rmt.errors import UserError

LOCK_WAIT_S = 20.0
"""Seconds a start waits for the workers of a killed one to disappear."""


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
    step: int = 0
    """The checkpoint's step that the latest of them went on from."""
    fruitless: int = 0
    """How many starts in a row before it saved no new checkpoint."""
    id: str | None = None
    """Identity of those contents: new whenever the stage begins from nothing."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Identity of each input, by role, that those contents were made from."""

    def fruitless_before(self, step: int, *, attended: bool) -> int:
        """``fruitless`` of a start from a checkpoint of ``step`` (0: none).

        attended: somebody chose to start it; who starts a failed stage again has seen to it, and the count begins anew.
        """
        if self.attempts == 0 or step > self.step or (attended and self.status == "failed"):
            return 0
        return self.fruitless + 1

    def begin(self, step: int, *, attended: bool) -> None:
        """Count a start from a checkpoint of ``step``."""
        self.fruitless = self.fruitless_before(step, attended=attended)
        self.status, self.checkpoint, self.finished, self.step = "running", None, None, step
        self.attempts += 1


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
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinity are refused (ValueError): other readers do not take them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_writable(path: Path, key: str = "run_dir") -> None:
    """Raise UserError unless files can be written at ``path``, which need not exist; leaves nothing behind.

    key: what the path is called in the message.
    """
    existing = nearest_existing(path)
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        with tempfile.TemporaryDirectory(prefix=".nemo-rmt-", dir=existing) as probe:
            (Path(probe) / "probe").write_bytes(b"0" * 4096)
    except OSError as error:
        raise UserError(f"{key}={path} is not writable ({error}): choose another {key}") from error


def check_space(path: Path, needed: int) -> None:
    """Raise UserError unless the file system of ``path`` has ``needed`` bytes free."""
    free = shutil.disk_usage(nearest_existing(path)).free
    if free < needed:
        raise UserError(
            f"run_dir={path} has {readable_size(free)} free, the run needs about {readable_size(needed)}: free some "
            "space, lower flywheel.keep_checkpoints or choose another run_dir"
        )


def nearest_existing(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    path = Path(path).absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def readable_size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
