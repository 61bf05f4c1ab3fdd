"""Checkpoints of Hugging Face folders, and the other way: the commands ``import`` and ``export``. Imports no torch.

The work is that of ``nemo_rmt.megatron.convert``, a local process for each rank, all on the CPU: memory for a model of
any size is easier to find there, and a GPU would wait for the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from nemo_rmt import pulse
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DONE, FAILED, WRONG_INPUT
from nemo_rmt.launch.ranks import Ranks
from nemo_rmt.launch.stage import SETTLE_S, Outcome, judge
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.process import Interrupted, signals_raise
from nemo_rmt.stages.job import StageJob

POLL_S = 0.1
LOG_TAIL = 4000
"""Characters of a failed rank's output that are shown."""


def run_import(given: dict[str, str]) -> int:
    """Make a checkpoint of the Hugging Face folder ``source``; returns the exit status.

    given: source, target; precision, tensor, pipeline where they are not to be bf16, 1, 1. Raises UserError.
    """
    target = Path(given["target"])
    if status := _convert("import", {"precision": "bf16", **given}):
        return status
    print(f"wrote {target}: set pretrain.checkpoint={target} and tokenizer.path={target / 'tokenizer'}")
    return DONE


def run_export(given: dict[str, str]) -> int:
    """Make a Hugging Face folder of the checkpoint ``source``; returns the exit status.

    given: source, target; precision, tensor, pipeline where they are not to be the checkpoint's, 1, 1; tokenizer where
    the checkpoint's is not to be found. Raises UserError.
    """
    source, target = Path(given["source"]), Path(given["target"])
    if not source.is_dir():
        raise UserError(f"source={source} does not exist")
    inspect_checkpoint(source)
    given = {**given, "tokenizer": given.get("tokenizer") or str(tokenizer_of(source))}
    if status := _convert("export", given):
        return status
    print(f"wrote {target}: transformers' AutoModelForCausalLM and AutoTokenizer load it")
    return DONE


def tokenizer_of(checkpoint: Path) -> Path:
    """The folder of the tokenizer that a checkpoint was trained with: beside the weights of an imported one, with the
    run's data otherwise. Raises UserError when it is not there."""
    beside, stage = checkpoint / "tokenizer", checkpoint.resolve().parent.parent
    if beside.is_dir():
        return beside
    if (stage / "stage.yaml").is_file():
        data = StageJob.load(stage / "stage.yaml").input_folder(stage, "data")
        if data is not None and (data / "tokenizer").is_dir():
            return data / "tokenizer"
    raise UserError(
        f"source={checkpoint}: neither {beside} nor the data stage of its run is there: give the folder of the "
        "tokenizer it was trained with, tokenizer=FOLDER"
    )


def _convert(command: str, given: dict[str, str]) -> int:
    """Run the conversion's ranks to their end. Raises UserError when they refuse; nothing is left of one that fails."""
    sizes = {key: _size(key, given.get(key, "1")) for key in ("tensor", "pipeline")}
    world_size = sizes["tensor"] * sizes["pipeline"]
    try:
        with signals_raise(), tempfile.TemporaryDirectory(prefix="nemo-rmt-") as folder:
            keys = json.dumps({**given, **sizes})
            outcome = _run(
                ["-W", "ignore", "-m", "nemo_rmt.megatron.convert", command, folder, keys], world_size, folder
            )
            log = Path(folder) / f"rank_{outcome.rank}.log"
            shown = log.read_text(errors="replace")[-LOG_TAIL:] if log.is_file() else ""
    except Interrupted as interrupted:
        outcome, shown = Outcome(128 + interrupted.signum, f"stopped by {interrupted}"), ""
    if outcome.status == DONE:
        return DONE
    if outcome.status == WRONG_INPUT:
        raise UserError(outcome.reason)
    target = Path(given["target"])
    shutil.rmtree(target.with_name(f"{target.name}.tmp"), ignore_errors=True)  # of ranks that were killed
    print(f"{shown}nemo-rmt: {command} failed: {outcome.reason}", file=sys.stderr)
    return outcome.status if outcome.status > 128 else FAILED


def _run(arguments: list[str], world_size: int, folder: str) -> Outcome:
    """Start the ranks and wait until all have ended, or one has failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {"OMP_NUM_THREADS": str(max(1, cores // world_size)), "TORCH_COMPILE_DISABLE": "1", **os.environ}
    with Ranks(
        [sys.executable, *arguments],
        {**env, "CUDA_VISIBLE_DEVICES": ""},
        range(world_size),
        world_size=world_size,
        address="127.0.0.1",
        port=_free_port(),
        log=Path(folder),
    ) as ranks:
        while len(ended := ranks.ended()) < world_size and not any(ended.values()):
            time.sleep(POLL_S)
        if any(ended.values()):
            time.sleep(SETTLE_S)  # the one to blame may be noticed second
        ended = ranks.ended()
    beats = pulse.read(Path(folder), world_size)
    outcome = judge(ended, world_size, beats, None)
    if outcome.status == WRONG_INPUT:  # of the input, whichever rank says it
        return Outcome(WRONG_INPUT, beats[outcome.rank].failure, outcome.rank)
    return outcome


def _size(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{key}={value} is not a whole number of 1 or more")
    return int(value)


def _free_port() -> int:
    """One that rank 0 can listen on. It is free again at once: a port that is taken in between fails the start."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
