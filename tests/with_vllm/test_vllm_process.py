"""The life of a server's processes, mostly with stand-ins that start and end at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import served_model
from served_model import session_processes

from nemo_rmt.errors import UserError
from nemo_rmt.rollout.engine import EngineLost
from nemo_rmt.rollout.vllm import process as vllm_process
from nemo_rmt.rollout.vllm.process import ServerProcess, server_command, server_devices, server_environment

FAMILY = ["bash", "-c", "sleep 1000 & echo started; sleep 1000"]
"""A server with a child of its own."""
STUBBORN = ["bash", "-c", "trap '' TERM; echo started; while true; do sleep 0.1; done"]


def until(condition, limit_s: float = 10) -> bool:
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit_s:
            return False
        time.sleep(0.05)
    return True


def process(folder: Path, monkeypatch, command: list[str], **vllm) -> ServerProcess:
    """One that runs ``command`` instead of vLLM."""
    monkeypatch.setattr(vllm_process, "server_command", lambda *_, **__: command)
    settings, log = served_model.rollout(**vllm), folder / "log" / "server.log"
    return ServerProcess(settings, served_model.MODEL, model_folder=folder, transfer="gloo", log=log)


def test_closing_ends_the_server_and_its_children(tmp_path, monkeypatch):
    started = process(tmp_path, monkeypatch, FAMILY)
    assert until(lambda: len(session_processes(started.pid)) == 2) and started.ended() is None
    started.close()
    assert session_processes(started.pid) == []
    started.close()


def test_closing_ends_a_server_that_does_not_listen(tmp_path, monkeypatch):
    started = process(tmp_path, monkeypatch, STUBBORN)
    assert until(lambda: "started" in started.log.read_text())
    started.close()
    assert session_processes(started.pid) == []


def test_children_do_not_outlive_a_server_that_is_killed(tmp_path, monkeypatch):
    started = process(tmp_path, monkeypatch, FAMILY)
    assert until(lambda: len(session_processes(started.pid)) == 2)
    os.kill(started.pid, signal.SIGKILL)
    assert until(lambda: started.ended() is not None)
    assert session_processes(started.pid) == []
    assert "exit status 137, killed by signal 9" in started.ended() and str(started.log) in started.ended()


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "vllm"])
def test_nothing_outlives_a_trainer_that_is_killed(tmp_path, real):
    if real:
        pytest.importorskip("vllm")
    folder = served_model.model_folder(tmp_path)
    script = f"""
import sys, time, threading
from pathlib import Path
import served_model
from nemo_rmt.rollout.vllm import process as vllm_process
if not {real}:
    vllm_process.server_command = lambda *_, **__: {FAMILY}
def start():
    made = vllm_process.ServerProcess(served_model.rollout(), served_model.MODEL,
        model_folder=Path({str(folder)!r}), transfer="gloo", log=Path({str(folder / "log")!r}))
    print(made.pid, flush=True)
thread = threading.Thread(target=start)  # its end must not end the server
thread.start()
thread.join()
time.sleep(1000)
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], env=served_model.environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        server = int(trainer.stdout.readline())
        # vLLM: the server, its resource tracker, the engine
        assert until(lambda: len(session_processes(server)) >= 2 + real, limit_s=120)
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert until(lambda: session_processes(server) == [], limit_s=15)


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"]
    started = process(tmp_path, monkeypatch, command)
    with pytest.raises(EngineLost, match=r"(?s)exit status 3\).*log/server.log:\n  out of memory$"):
        started.wait_until(lambda: False)


def test_only_this_starts_lines_are_quoted(tmp_path, monkeypatch):
    first = process(tmp_path, monkeypatch, [sys.executable, "-c", "print('of the first')"])
    assert until(lambda: first.ended() is not None)
    second = process(tmp_path, monkeypatch, [sys.executable, "-c", "print('of the second')"])
    assert until(lambda: second.ended() is not None)
    assert "of the first" not in second.ended() and "of the second" in second.ended()
    assert "of the first" in second.log.read_text()


def test_a_server_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    started = process(tmp_path, monkeypatch, FAMILY, start_timeout_s=1)
    with pytest.raises(EngineLost, match=r"(?s)start_timeout_s=1;.*server.log:\n  started$"):
        started.wait_until(lambda: False)
    assert session_processes(started.pid) == []


def test_a_busy_port_or_foreign_address_is_the_users_error(tmp_path, monkeypatch):
    started = process(tmp_path, monkeypatch, ["true"])
    port = int(started.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match=f"rollout.vllm.port={port}"):
        process(tmp_path, monkeypatch, ["true"], port=port)
    with pytest.raises(UserError, match="rollout.vllm.host=192.0.2.1"):
        process(tmp_path, monkeypatch, ["true"], host="192.0.2.1")


def test_the_server_gets_the_gpus_after_the_trainings(monkeypatch):
    monkeypatch.setattr(vllm_process, "gpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert server_devices(served_model.rollout(tensor=2, data=2)) == "4,5,6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,GPU-abc")
    assert server_devices(served_model.rollout(tensor=2)) == "3,GPU-abc"
    assert server_environment(served_model.rollout(tensor=2), "key")["CUDA_VISIBLE_DEVICES"] == "3,GPU-abc"
    with pytest.raises(UserError, match="needs 3 GPUs besides the 4 .* shows 6.*placement=colocated"):
        server_devices(served_model.rollout(tensor=3))


def test_the_server_does_not_take_the_trainers_place_in_its_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    env = server_environment(served_model.rollout(), "key")
    assert not [name for name in env if name in vllm_process.LAUNCHER or name.startswith("TORCHELASTIC")]
    assert env["VLLM_API_KEY"] == "key" and env["PATH"]


def test_the_command_line_says_what_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_process, "gpu_count", lambda: 1)
    settings = served_model.rollout(tensor=2, data=3, gpu_memory_utilization=0.7, kv_cache_gib=0.5)
    command = server_command(
        settings, served_model.MODEL, model_folder=tmp_path, host="127.0.0.1", port=99, transfer="nccl"
    )
    wanted = ["--tensor-parallel-size=2", "--data-parallel-size=3", "--gpu-memory-utilization=0.7", "--dtype=float32"]
    wanted += ["--max-model-len=256", "--max-num-seqs=16", "--kv-cache-memory-bytes=536870912", "--port=99"]
    wanted += ['--weight-transfer-config={"backend": "nccl"}', "--host=127.0.0.1", str(tmp_path)]
    wanted += ["--logprobs-mode=processed_logprobs", "--enable-prefix-caching"]
    assert set(wanted) <= set(command) and "--enforce-eager" not in command
    assert "--trust-remote-code" not in " ".join(command)
