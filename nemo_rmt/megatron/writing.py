"""Writing a checkpoint's files: hashed by who writes them, and failing on every rank with the system's own reason.

What Megatron 0.16 does with a full disk: a shard's error comes out of ``save`` (or of the poll that completes a save in
the background) on every rank as a CheckpointException, which is no Exception, names its causes on rank 0 only and as
text, for they crossed a process's border; behind it torch 2.13 hides the OSError under "unexpected pos". Rank 0 writes
``common.pt`` alone, in C++ that gives no reason, and at the end ``.metadata`` and ``metadata.json``, while the others
wait for what comes next, which does not come when it fails.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import CheckpointException

from nemo_rmt.manifest import FileRecord, hash_file, hash_files, system_error, write_manifest
from nemo_rmt.process import die_with_parent
from nemo_rmt.run_folder import sync

T = TypeVar("T")


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Do the work on every rank and return what it gave, in rank order.

    Raises on every rank when it failed on one: OSError, with the system's number, or RuntimeError.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (result, None if error is None else str(system_error(error) or error)))
    reasons = {rank: reason for rank, (_, reason) in enumerate(found) if reason is not None}
    if reasons:
        raise _failure(reasons) from error
    return [result for result, _ in found]


def rank_0(work: Callable[[], Any]) -> None:
    """Do the work on rank 0 while the others wait; a failure is everyone's, as of ``on_every_rank``."""
    on_every_rank(work if dist.get_rank() == 0 else lambda: None)


@contextlib.contextmanager
def failing_together(deferred: list[OSError]) -> Iterator[None]:
    """A block in which Megatron writes. A failed write raises OSError or RuntimeError on every rank, with the reason.

    deferred: takes the errors of the files that rank 0 writes last, alone. Megatron goes on as if they were written:
    raise them, on every rank, before the checkpoint is completed.
    """
    finish, save_config = FileSystemWriterAsync.finish, serialization.save_config
    try:
        with (
            mock.patch.object(TorchCommonSaveStrategy, "save_common", _save_common),
            mock.patch.object(FileSystemWriterAsync, "finish", _deferring(finish, deferred)),
            mock.patch.object(serialization, "save_config", _deferring(save_config, deferred)),
            mended_writers(),
        ):
            yield
    except CheckpointException as error:  # raised by all ranks together; rank 0 has the reasons
        reasons = [{rank: str(cause) for rank, (cause, _) in error.failures.items()}]
        dist.broadcast_object_list(reasons, src=0)
        raise _failure(reasons[0]) from error


def raise_first(errors: list[OSError]) -> None:
    """Raise the first, if there is any."""
    if errors:
        raise errors[0]


@contextlib.contextmanager
def mended_writers() -> Iterator[None]:
    """A block in which the processes that this one starts to write shards end with it, and say why they fail.

    Otherwise a writer whose parent was killed waits for it for ever, with the run's lock in its hands, and its OSErrors
    are lost.
    """
    write_shard, write_item = FileSystemWriterAsync.write_preloaded_data, filesystem_async._write_item

    @functools.wraps(write_shard)
    def shard_written(*arguments: Any, **keys: Any) -> None:
        die_with_parent(multiprocessing.parent_process().pid)
        write_shard(*arguments, **keys)

    @functools.wraps(write_item)
    def item_written(*arguments: Any, **keys: Any) -> Any:
        try:
            return write_item(*arguments, **keys)
        except Exception as error:
            raise (system_error(error) or error) from None

    with (
        mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(shard_written)),
        mock.patch.object(filesystem_async, "_write_item", item_written),
    ):
        yield


def write_and_hash(
    write: Callable[..., None], hashed: MutableMapping[str, FileRecord], rank: int, buckets: list, results: Any
) -> None:
    """Write a rank's shards, in its writer process, and note the checksum of each by name.

    write, rank, buckets, results: the function of Megatron's that writes, and its arguments. A shard that cannot be
    read back is left out: who completes the checkpoint hashes it, and fails.
    """
    write(rank, buckets, results)
    for path, _, _ in buckets:
        with contextlib.suppress(OSError):
            hashed[Path(path).name] = hash_file(Path(path))


def hash_own(folder: Path, hashed: MutableMapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Size and checksum of the shards that this rank wrote, by name; those in ``hashed`` are known."""
    known = dict(hashed)
    unknown = [path for path in folder.glob(f"__{dist.get_rank()}_*.distcp") if path.name not in known]
    return known | dict(zip((path.name for path in unknown), hash_files(unknown), strict=True))


def complete_draft(draft: Path, target: Path, identity: dict[str, Any], hashed: dict[str, FileRecord]) -> None:
    """Write a draft's manifest, with ``identity`` and all its files, and rename it to ``target``, which it replaces.

    hashed: checksums of the shards that are known. Once this returns a power cut takes nothing of the checkpoint, so
    that older ones may go.
    """
    files = dict(hashed)
    for path in draft.rglob("*"):
        name = path.relative_to(draft).as_posix()
        if path.is_file() and name not in files:  # all but shards, of which Megatron syncs not all
            sync(path)
            files[name] = hash_file(path)
    write_manifest(draft, identity, files)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    sync(target.parent)


def make_empty(folder: Path) -> None:
    """Make a folder anew, without what a save that failed left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def delete_drafts(folder: Path) -> None:
    """Delete the drafts in a stage's ``checkpoints`` folder."""
    for draft in folder.glob("*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)


def _save_common(self: TorchCommonSaveStrategy, state: dict[str, Any], folder: str | Path) -> None:
    def save() -> None:
        with open(Path(folder) / COMMON_STATE_FNAME, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    rank_0(save)


def _deferring(write: Callable[..., None], deferred: list[OSError]) -> Callable[..., None]:
    @functools.wraps(write)
    def written(*arguments: Any, **keys: Any) -> None:
        try:
            write(*arguments, **keys)
        except OSError as error:
            deferred.append(error)

    return written


def _failure(reasons: dict[int, str]) -> OSError | RuntimeError:
    """What every rank raises for what was wrong on some."""
    text = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
    number = re.search(r"\[Errno (\d+)\] ", text)
    return OSError(int(number[1]), text.replace(number[0], "")) if number else RuntimeError(text)
