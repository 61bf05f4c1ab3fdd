"""Save and verify checkpoints on every rank, and write what each rank saw to OUT/rank_N.json.

usage: checkpoint_worker.py save|save_asynchronously|verify OUT STAGE ...
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from megatron.core.dist_checkpointing.strategies import filesystem_async

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_model import VOCAB, next_token, random_batch, tiny_recipe, trained

from nemo_rmt import manifest
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import is_disk_full, step_folders
from nemo_rmt.megatron import writing
from nemo_rmt.megatron.checkpoint import Checkpoints, require_sound, sound_checkpoint
from nemo_rmt.megatron.runtime import distributed

RECIPE = tiny_recipe(parallel={"tensor": 2}, cluster={"gpus_per_node": 2})  # each rank has shards to write


def checkpoints(stage: Path, *, asynchronous: bool = False) -> Checkpoints:
    """Of a stage that keeps two."""
    identity = {"stage": "pretrain", "iteration": 0, "model": RECIPE.model.model_dump(mode="json")}
    identity |= {"vocab_size": VOCAB, "tokenizer": "f" * 64}
    return Checkpoints(stage / "checkpoints", keep=2, asynchronous=asynchronous, identity=identity)


def stepped():
    """A model after one step: Megatron saves no optimizer that never made one."""
    model = trained(RECIPE)
    model.train_step(random_batch(4).micro_batches(2), next_token)
    return model


def outcome(error: BaseException) -> dict:
    """What a failed save looks like from outside."""
    return {"type": type(error).__name__, "text": str(error), "full": is_disk_full(error)}


@contextlib.contextmanager
def noting_reads() -> Iterator[list[str]]:
    """A block that notes the files which this process hashes, as "folder/file"."""
    read, hash_file = [], manifest.hash_file

    def noted(path: Path) -> manifest.FileRecord:
        read.append(f"{path.parent.name}/{path.name}")
        return hash_file(path)

    with mock.patch.object(manifest, "hash_file", noted), mock.patch.object(writing, "hash_file", noted):
        yield read


def failing(*arguments: object, **keys: object) -> None:
    """Stands in for what writes a part of a shard."""
    raise OSError(errno.EIO, "Input/output error")


def save(stage: Path, rank: int, *, asynchronous: bool) -> dict:
    """Two checkpoints, and the files that this process hashed; then, unless in the background, one that fails."""
    saver, model = checkpoints(stage, asynchronous=asynchronous), stepped()
    with noting_reads() as read:
        for step in (2, 4):
            saver.save(step, model, {"tokens": step})
        saver.finish()
    if asynchronous:
        return {"read": read}
    with mock.patch.object(filesystem_async, "_write_item", failing if rank == 1 else filesystem_async._write_item):
        try:
            saver.save(6, model, {})
        except Exception as error:
            return {"read": read, "failure": outcome(error)}
    return {"read": read}


def verify(stage: Path) -> dict:
    """The newest sound checkpoint, what this rank read and warned of, and what is said of the newest as an input."""
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("nemo_rmt")
    logger.addHandler(handler)
    seen = {"found": None, "warnings": warnings, "refused": None, "required": None}
    with noting_reads() as seen["read"]:
        try:
            found = sound_checkpoint(stage)
            seen["found"] = found and found.name
        except UserError as error:
            seen["refused"] = str(error)
    logger.removeHandler(handler)
    try:
        require_sound(step_folders(stage)[0])
    except UserError as error:
        seen["required"] = str(error)
    return seen


def main(what: str, out: Path, stages: list[Path]) -> None:
    with distributed(RECIPE.parallel, seed=5) as layout:
        if what == "verify":
            result = {stage.name: verify(stage) for stage in stages}
        else:
            result = save(stages[0], layout.rank, asynchronous=what == "save_asynchronously")
    out.mkdir(exist_ok=True)
    (out / f"rank_{layout.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(stage) for stage in sys.argv[3:]])
