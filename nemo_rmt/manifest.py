"""manifest.json: what a complete checkpoint says about itself, and whether its files still are what was written.

Sizes are compared wherever a checkpoint is named, which costs nothing; checksums before its weights are loaded, by all
ranks together (``nemo_rmt.megatron.checkpoint``). Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_rmt import pulse
from nemo_rmt.errors import UserError
from nemo_rmt.run_folder import write_json

METADATA = "manifest.json"
FORMAT = 2
_STEP = re.compile(r"step_\d{8}")
_BLOCK = 2**22
"""Bytes read at a time."""
_READERS = 4
"""Files read at once: one core hashes about 1 GB/s, which is less than a cluster's file system gives."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, or whose files are not those that were written. An older one may be whole."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows about one file."""

    bytes: int
    sha256: str
    """In hexadecimal."""


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
    files: dict[str, FileRecord]
    """Every file, by name relative to the folder."""


def write_manifest(folder: Path, identity: dict[str, Any], files: Mapping[str, FileRecord]) -> None:
    """Write a checkpoint's manifest. identity: the entries of CheckpointInfo besides folder and files."""
    records = {name: asdict(record) for name, record in sorted(files.items())}
    write_json(folder / METADATA, {"format": FORMAT, **identity, "files": records})


def inspect_checkpoint(folder: Path) -> CheckpointInfo:
    """What a checkpoint says about itself, after comparing its files' sizes with its manifest.

    Raises UserError when it does not exist or has another format, DamagedCheckpoint when it is incomplete, its
    manifest cannot be read, or a file is missing or has another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    try:
        raw = json.loads((folder / METADATA).read_text())
        if raw["format"] != FORMAT:
            raise UserError(
                f"checkpoint {folder} has format {raw['format']}, this version reads format {FORMAT}: make it again, "
                "or use the version that wrote it"
            )
        keys = ("stage", "iteration", "step", "model", "vocab_size", "tokenizer")
        files = {name: FileRecord(**record) for name, record in raw["files"].items()}
        info = CheckpointInfo(folder, **{key: raw[key] for key in keys}, files=files)
    except FileNotFoundError:
        steps = sorted([*folder.glob("step_*"), *folder.glob("checkpoints/step_*")])
        hint = f"; it holds checkpoints, give one of them, for example {steps[-1]}" if steps else ""
        raise DamagedCheckpoint(f"{folder} is not a complete checkpoint: it has no {METADATA}{hint}") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: cannot read {METADATA} ({error!r})") from None
    for name, record in info.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"checkpoint {folder} is truncated: {name} is missing")
        if (size := path.stat().st_size) != record.bytes:
            raise DamagedCheckpoint(
                f"checkpoint {folder} is truncated: {name} has {size} bytes instead of {record.bytes}"
            )
    return info


def verify_files(info: CheckpointInfo, names: Iterable[str]) -> None:
    """Read these files of a checkpoint and raise DamagedCheckpoint at the first that is not what was written."""
    with ThreadPoolExecutor(_READERS) as pool:
        records = {name: pool.submit(hash_file, info.folder / name) for name in names}
    for name, record in records.items():
        try:
            found = record.result()
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {info.folder} is damaged: {name} cannot be read ({error})") from None
        if found != info.files[name]:
            raise DamagedCheckpoint(
                f"checkpoint {info.folder} is damaged: {name} has SHA-256 {found.sha256[:12]}... instead of "
                f"{info.files[name].sha256[:12]}..."
            )


def hash_files(paths: Iterable[Path]) -> list[FileRecord]:
    """Sizes and checksums of files as they can be read now, in their order."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(hash_file, paths))


def hash_file(path: Path) -> FileRecord:
    """Size and checksum of a file as it can be read now."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    pulse.tick()
    return FileRecord(size, digest.hexdigest())


def fair_shares(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names of files in ``parts`` lists with about the same number of bytes: the same for every caller."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        shares[lightest].append(name)
        loads[lightest] += sizes[name]
    return shares


def step_folders(stage_dir: Path) -> list[Path]:
    """A stage's checkpoints, the newest first, those that are damaged too."""
    folders = (Path(stage_dir) / "checkpoints").glob("step_*")
    return sorted((path for path in folders if _STEP.fullmatch(path.name)), reverse=True)


def latest_checkpoint(stage_dir: Path) -> Path | None:
    """The newest of a stage's checkpoints that is complete, by the sizes of its files.

    Raises UserError when it has another format.
    """
    for folder in step_folders(stage_dir):
        try:
            inspect_checkpoint(folder)
        except DamagedCheckpoint:
            continue
        return folder
    return None


def latest_step(stage_dir: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one. Raises UserError when it has another format."""
    folder = latest_checkpoint(stage_dir)
    return 0 if folder is None else checkpoint_step(folder)


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step_"))


def system_error(error: BaseException) -> OSError | None:
    """The OSError that led to an exception."""
    return next((each for each in _causes(error) if isinstance(each, OSError)), None)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception comes of a full disk or a used-up quota.

    An exception that crossed from one process to another has lost its causes; Megatron's and torch's carry their text.
    """
    marks = [f"[Errno {number}]" for number in _FULL]
    return any(
        (isinstance(each, OSError) and each.errno in _FULL) or any(mark in str(each) for mark in marks)
        for each in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what led to it, the causes given with ``from`` and those being handled as it was raised."""
    pending, seen = [error], set()
    while pending:
        each = pending.pop(0)
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            pending += [each.__cause__, each.__context__]
