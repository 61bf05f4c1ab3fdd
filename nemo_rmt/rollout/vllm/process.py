"""A `vllm serve` of the stage's own: its command line, and its life from start to end."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nemo_rmt import pulse
from nemo_rmt.config import Model, Rollout
from nemo_rmt.errors import UserError
from nemo_rmt.process import gpu_count
from nemo_rmt.rollout.engine import EngineLost

POLL_S = 0.5
SAY_S = 30.0
LAST_LINES = 15
CPU_KV_CACHE_GIB = 1.0
CPU_BLOCK_SIZE = 32
"""Tokens that share a prefix at once; vLLM takes 128 on a CPU, more than a short prompt has, and 16 on a GPU."""
GIB = 2**30
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""This rank's place among the training's, which vLLM would take for its own."""


def logprobs_mode(settings: Rollout) -> str:
    """What vLLM must report to give log-probabilities at the sampling temperature before top-p."""
    return "processed_logprobs" if settings.top_p == 1 else "raw_logprobs"


def server_command(
    settings: Rollout, model: Model, *, model_folder: Path, host: str, port: int, transfer: str
) -> list[str]:
    """The command line of the server. transfer: "gloo" or "nccl", how it gets weights."""
    vllm = settings.vllm
    cpu = gpu_count() == 0
    options = {
        "served-model-name": "policy",
        "host": host,
        "port": port,
        "load-format": "dummy",
        "generation-config": "vllm",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[model.precision],
        "max-model-len": model.max_position,
        "max-num-seqs": settings.batch_size,
        "logprobs-mode": logprobs_mode(settings),
        "tensor-parallel-size": vllm.tensor,
        "data-parallel-size": vllm.data,
        "api-server-count": 1,
        "weight-transfer-config": json.dumps({"backend": transfer}),
        "worker-extension-cls": "nemo_rmt.rollout.vllm.worker.Extension",
        "middleware": "nemo_rmt.rollout.vllm.worker.RequireKey",
        "uvicorn-log-level": "warning",
    }
    if vllm.kv_cache_gib is not None or cpu:
        options["kv-cache-memory-bytes"] = int((vllm.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB)
    if cpu:
        options["block-size"] = CPU_BLOCK_SIZE
    else:
        options["gpu-memory-utilization"] = vllm.gpu_memory_utilization
    switches = ["skip-tokenizer-init", "enable-scale-out", "enable-prefix-caching", "enable-prompt-tokens-details"]
    if vllm.enforce_eager or cpu:
        switches.append("enforce-eager")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_folder)]
    return command + [f"--{name}={value}" for name, value in options.items()] + [f"--{name}" for name in switches]


def server_devices(settings: Rollout) -> str | None:
    """CUDA_VISIBLE_DEVICES of the server: the GPUs of this node after the training's; None without GPUs.

    Raises UserError when there are too few.
    """
    total = gpu_count()
    if total == 0:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(total)]
    training = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = settings.vllm.tensor * settings.vllm.data
    if len(devices) < training + needed:
        raise UserError(
            f"rollout.vllm.tensor={settings.vllm.tensor} × rollout.vllm.data={settings.vllm.data} needs {needed} GPUs "
            f"besides the {training} that train on this node, which shows {len(devices)}: lower them or "
            "cluster.gpus_per_node, name a running server in rollout.vllm.url, or set rollout.vllm.placement=colocated"
        )
    return ",".join(device.strip() for device in devices[training : training + needed])


def server_environment(settings: Rollout, key: str) -> dict[str, str]:
    """The environment of the server. key: what every request must bring."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    devices = server_devices(settings)
    if devices is None:
        # vLLM would pin its threads to all cores, which the training uses too.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    else:
        env["CUDA_VISIBLE_DEVICES"] = devices
    # The routes for weights exist in this mode only. It also has some that run any method of a worker: hence the key.
    return env | {
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0. Raises UserError when this node cannot listen there."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
            return listening.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"rollout.vllm.host={host}, rollout.vllm.port={port}: the server cannot listen there ({error}): give an "
            "address of this node, and port 0 for a free one"
        ) from None


class ServerProcess:
    """A server, and all of its processes, from construction until ``close``, its own death, or this process's.

    Args:
        model_folder: with a config.json. transfer: see ``server_command``. log: where its output goes, appended.

    Only who knows ``key`` can ask it for anything: its routes can replace the weights and call into its workers.
    """

    def __init__(self, settings: Rollout, model: Model, *, model_folder: Path, transfer: str, log: Path):
        self.log = log
        self.timeout_s = settings.vllm.start_timeout_s
        self.key = secrets.token_urlsafe(32)
        host = settings.vllm.host
        port = free_port(host, settings.vllm.port)
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        command = server_command(settings, model, model_folder=model_folder, host=host, port=port, transfer=transfer)
        env = server_environment(settings, self.key)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "nemo_rmt.rollout.vllm.guard", str(os.getpid()), *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self.pid = int(self._guard.stdout.readline() or -1)
        """Of the server."""

    def ended(self) -> str | None:
        """None while it runs; else what is known of its end."""
        status = self._guard.poll()
        if status is None:
            return None
        killed = f", killed by signal {status - 128}" if status > 128 else ""
        return f"the vLLM server ended (exit status {status}{killed}); its output is {self.log}{self._last_lines()}"

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until it answers. Raises EngineLost when it ends before, or takes longer than start_timeout_s."""
        start = said = time.monotonic()
        print(f"vLLM server: starting (its output: {self.log})", flush=True)
        while not ready():
            reason = self.ended()
            now = time.monotonic()
            if reason is None and now - start > self.timeout_s:
                reason = (
                    f"the vLLM server did not answer within rollout.vllm.start_timeout_s={self.timeout_s:g}; "
                    f"its output is {self.log}{self._last_lines()}"
                )
            if reason is not None:
                self.close()
                raise EngineLost(reason)
            if now - said > SAY_S:
                said = now
                print(f"vLLM server: still starting after {now - start:.0f} s", flush=True)
            pulse.tick("starting the vLLM server")
            time.sleep(POLL_S)
        print(f"vLLM server: ready after {time.monotonic() - start:.0f} s", flush=True)

    def close(self) -> None:
        """End it with everything it started."""
        self._guard.terminate()
        self._guard.wait()
        self._guard.stdout.close()

    def _last_lines(self) -> str:
        with self.log.open("rb") as output:
            output.seek(self._log_start)
            lines = output.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
        return ":\n  " + "\n  ".join(lines) if lines else ""
