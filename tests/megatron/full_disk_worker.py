"""Save on a small disk of its own that is full before a file of the checkpoint, on two ranks.

usage: full_disk_worker.py DISK OUT synchronous|asynchronous FILE ...

DISK: an empty folder. The disk is mounted there for these processes alone, and gone with the last of them. FILE: the
first that finds no room, one save each. What each rank saw is written to OUT/rank_N.json, by file.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path

from checkpoint_worker import RECIPE, checkpoints, outcome, stepped

from nemo_rmt.megatron.checkpoint import sound_checkpoint
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.writing import rank_0

MOUNT = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
PAGE = 4096


def room_for(files: list[Path]) -> int:
    """Bytes that these files take on the disk."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def fill(disk: Path, *, leaving: int) -> None:
    """Write a file that leaves so many bytes."""
    with open(disk / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leaving))


def main(disk: Path, out: Path, asynchronous: bool, full_at: list[str]) -> None:
    results = {}
    with distributed(RECIPE.parallel, seed=5) as layout:
        model, whole = stepped(), disk / "checkpoints" / "step_00000002"
        checkpoints(disk).save(2, model, {})
        shards = sorted(path.name for path in whole.glob("*.distcp"))
        order = ["common.pt", *shards, ".metadata", "metadata.json", "manifest.json"]
        for name in full_at:
            room = room_for([whole / earlier for earlier in order[: order.index(name)]])
            saver = checkpoints(disk, asynchronous=asynchronous)
            rank_0(functools.partial(fill, disk, leaving=room))
            try:
                saver.save(4, model, {})
                saver.finish()
            except Exception as error:
                results[name] = outcome(error) | {"sound": sound_checkpoint(disk).name}  # rank 0 has tidied up
                results[name]["left"] = sorted(path.name for path in whole.parent.iterdir())
            rank_0((disk / "filler").unlink)
        checkpoints(disk).save(4, model, {})
        results["afterwards"] = {"sound": sound_checkpoint(disk).name}
    (out / f"rank_{layout.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    if "RANK" not in os.environ:
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *sys.argv]
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", MOUNT, sys.argv[1], *ranks])
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "asynchronous", sys.argv[4:])
