"""Running lm-eval on the exported model, in a process of its own, and reading what it found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from nemo_rmt import pulse
from nemo_rmt.families import config_json
from nemo_rmt.megatron.hugging_face import export_folder
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.megatron.runtime import max_over_ranks
from nemo_rmt.megatron.writing import rank_0
from nemo_rmt.run_folder import write_text
from nemo_rmt.stages.lm_eval.tasks import chosen_tasks, write_tasks
from nemo_rmt.stages.session import Session

EXPORTED = "hugging_face"
"""The exported model, in the stage's folder."""
WORK = "lm_eval"
"""Tasks, configuration and results of lm-eval, in the stage's folder."""
LOG = Path("log") / "lm_eval.log"
POLL_S = 0.5
TAIL_LINES = 8
"""Last lines of its log that a failure shows."""
NOT_ITS_OWN = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "MASTER_", "TORCHELASTIC_", "PMI", "OMPI_", "MV2_", "HF_")
"""Beginnings of variables that lm-eval does not get: with a rank's place it would wait for other ranks, and with a
user's token it would call the hub."""


def require_exportable(session: Session) -> None:
    """Raise UserError when no published architecture expresses the model: at once, not after all that is measured."""
    config_json(session.recipe.model, session.vocab_size, eos=session.tokenizer.eod)


def export(session: Session, chunks: list[LogprobGPT]) -> None:
    """Write the model as a Hugging Face folder, for lm-eval and for whoever wants it. Collective."""

    def clear() -> None:
        for name in (EXPORTED, WORK):
            shutil.rmtree(session.folder / name, ignore_errors=True)

    rank_0(clear)  # of what an interrupted attempt left
    export_folder(
        chunks,
        session.recipe.model,
        session.folder / EXPORTED,
        session.data_folder / "tokenizer",
        session.vocab_size,
    )


def measure(session: Session) -> dict[str, float]:
    """Run lm-eval on the exported model; its metrics on rank 0. Collective: the other ranks wait for rank 0.

    Raises RuntimeError when it fails, with the end of its log.
    """
    process, log = None, session.folder / LOG
    if session.layout.rank == 0:
        process = start(write_configuration(session), session.folder)
    try:
        watch(process, log)
    finally:
        if process is not None:
            process.kill()
            process.wait()
    return {} if process is None else read_metrics(session.folder / WORK)


def write_configuration(session: Session) -> Path:
    """Write the tasks and what ``lm_eval run --config`` is told; returns the latter's path."""
    recipe, work = session.recipe, session.folder / WORK
    settings = recipe.evaluate.lm_eval
    questions = write_tasks(recipe, session.seed("evaluate"), work / "tasks")
    prompts = [session.tokenizer.chat_prompt([{"role": "user", "content": question}]) for question in questions]
    longest = max(map(len, prompts), default=0) + recipe.rollout.max_new_tokens
    include = [] if settings.include is None else [Path(settings.include).expanduser()]
    configuration: dict[str, Any] = {
        "model": "hf",
        "model_args": {
            "pretrained": str((session.folder / EXPORTED).absolute()),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[recipe.model.precision],
            "add_bos_token": False,  # the chat template writes all there is
            # lm-eval cuts the beginning off what is longer; we ask the whole question, whatever its length.
            "max_length": max(recipe.model.max_position, longest),
        },
        "tasks": chosen_tasks(recipe),
        "include_path": [str(folder.absolute()) for folder in (*include, work / "tasks")],
        "apply_chat_template": True,
        "batch_size": settings.batch_size,
        "device": str(session.layout.device),
        "limit": settings.limit,
        "seed": session.seed("lm_eval"),
        "output_path": str((work / "results.json").absolute()),
        "log_samples": True,
    }
    write_text(work / "config.yaml", yaml.safe_dump(configuration, sort_keys=False))
    return work / "config.yaml"


def start(configuration: Path, folder: Path) -> subprocess.Popen:
    """Start lm-eval; all it prints goes to the log. It ends with this process, however that ends."""
    log = folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nemo_rmt.stages.lm_eval", str(os.getpid()), "run", "--config", str(configuration)]
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            env=environment(folder / WORK / "cache"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def environment(cache: Path) -> dict[str, str]:
    """This process's variables without its place among the ranks; offline, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_ITS_OWN)}
    offline = dict.fromkeys(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
    )
    return kept | offline | {"HF_HOME": str(cache.absolute())}


def watch(process: subprocess.Popen | None, log: Path) -> None:
    """Wait for rank 0's process, in steps so short that no collective runs into its timeout. Collective.

    Output counts as progress, silence does not: the stage's watchdog notices when it hangs.
    Raises RuntimeError on every rank when it failed.
    """
    written = 0
    while True:
        status = None if process is None else process.poll()
        size = written if process is None else log.stat().st_size
        over, failed, grown = max_over_ranks([float(status is not None), float(bool(status)), float(size > written)])
        written = size
        if grown:
            pulse.tick("lm-eval measures the exported model")
        if failed:
            raise RuntimeError(f"lm-eval failed; {log} ends with: {tail(log)}")
        if over:
            return
        time.sleep(POLL_S)


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])


def read_metrics(work: Path) -> dict[str, float]:
    """``lm_eval/<task>/<metric>``, each with its standard error as ``<metric>_stderr``, of the results lm-eval wrote.

    A metric of responses that went through a named filter is ``<metric>,<filter>``.
    """
    (file,) = work.glob("results_*.json")  # lm-eval adds the time to the name
    metrics = {}
    for task, figures in json.loads(file.read_text(encoding="utf-8"))["results"].items():
        for key, value in figures.items():
            name, _, filtered = key.partition(",")
            if filtered and isinstance(value, int | float):
                metrics[f"lm_eval/{task}/{name}" + ("" if filtered == "none" else f",{filtered}")] = float(value)
    return metrics
