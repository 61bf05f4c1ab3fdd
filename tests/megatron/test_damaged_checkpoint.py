"""Two ranks together: who hashes what, a damaged checkpoint is passed over, and a full disk ends every rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_checkpoint import write_checkpoint
from torchrun import run_ranks

from nemo_rmt.manifest import inspect_checkpoint, verify_files

WORKER = Path(__file__).with_name("checkpoint_worker.py")
FULL_DISK = Path(__file__).with_name("full_disk_worker.py")


def run(what: str, *stages: Path) -> list[dict]:
    """What each of two ranks saw."""
    out = stages[0].parent / what
    run_ranks(WORKER, 2, what, str(out), *map(str, stages))
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(2)]


def newest(stage: Path) -> Path:
    return stage / "checkpoints" / "step_00000004"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A stage with the checkpoints of steps 2 and 4, and what each rank saw as it saved them and failed at step 6."""
    stage = tmp_path_factory.mktemp("saved") / "whole"
    return stage, run("save", stage)


DAMAGES = {
    "flipped": (flip_a_bit, "damaged: __1_0.distcp has SHA-256 "),
    "truncated": (truncate, "truncated: __1_0.distcp has 100 bytes instead of "),
    "missing": (Path.unlink, "truncated: __1_0.distcp is missing"),
}


@pytest.fixture(scope="module")
def verified(saved) -> dict[str, tuple[dict, dict]]:
    """What two ranks see of the stage, of copies damaged in its newest checkpoint, of one damaged in both, and of one
    whose newest checkpoint has another format: by the copy's name, for each rank."""
    whole, _ = saved
    stages = [whole] + [whole.with_name(name) for name in (*DAMAGES, "both", "format")]
    for copy in stages[1:]:
        shutil.copytree(whole, copy)
    for name, (damage, _) in DAMAGES.items():
        damage(newest(whole.with_name(name)) / "__1_0.distcp")
    flip_a_bit(newest(whole.with_name("both")) / "common.pt")
    (whole.with_name("both") / "checkpoints/step_00000002/common.pt").unlink()
    write_checkpoint(whole.with_name("format") / "checkpoints/step_00000008", {}, format=1)
    first, second = run("verify", *stages)
    return {stage.name: (first[stage.name], second[stage.name]) for stage in stages}


def test_each_rank_hashes_the_shards_it_wrote_and_rank_0_the_rest(saved):
    stage, ranks = saved
    info = inspect_checkpoint(newest(stage))
    verify_files(info, info.files)
    for rank, rest in ((0, {"common.pt", ".metadata", "metadata.json"}), (1, set())):
        mine = {name for name in info.files if name.startswith(f"__{rank}_")}
        assert mine
        read = [name for name in ranks[rank]["read"] if name.startswith("step_00000004")]
        assert sorted(read) == sorted(f"step_00000004.tmp/{name}" for name in mine | rest)


def test_in_the_background_the_writers_hash_and_the_training_process_reads_no_shard(tmp_path):
    ranks = run("save_asynchronously", tmp_path / "stage")
    assert not [name for rank in ranks for name in rank["read"] if name.endswith(".distcp")]
    for step in (2, 4):
        info = inspect_checkpoint(tmp_path / f"stage/checkpoints/step_{step:08d}")
        assert {name[:4] for name in info.files} >= {"__0_", "__1_"}
        verify_files(info, info.files)


def test_when_one_rank_cannot_write_both_raise_its_reason_and_the_draft_is_gone(saved):
    stage, (first, second) = saved
    assert first["failure"] == second["failure"]
    assert (first["failure"]["type"], first["failure"]["full"]) == ("OSError", False)
    assert "rank 1: " in first["failure"]["text"] and "Input/output error" in first["failure"]["text"]
    assert sorted(os.listdir(stage / "checkpoints")) == ["step_00000002", "step_00000004"]


def test_the_ranks_share_the_reading_and_agree(saved, verified):
    stage, _ = saved
    ranks = verified["whole"]
    assert [(rank["found"], rank["warnings"], rank["required"]) for rank in ranks] == [("step_00000004", [], None)] * 2
    read = [name for rank in ranks for name in rank["read"]]
    assert sorted(read) == sorted(f"step_00000004/{name}" for name in inspect_checkpoint(newest(stage)).files)
    assert [sum(name.endswith(".distcp") for name in rank["read"]) for rank in ranks] == [2, 2]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_warning(verified, name):
    first, second = verified[name]
    assert first["found"] == second["found"] == "step_00000002"
    assert second["warnings"] == []
    (warning,) = first["warnings"]
    assert f"{name}/checkpoints/step_00000004 is {DAMAGES[name][1]}" in warning
    assert warning.endswith("; passing over it")


def test_without_a_sound_checkpoint_there_is_none_and_each_damage_is_told_once(verified):
    first, second = verified["both"]
    assert first["found"] is second["found"] is None
    assert (len(first["warnings"]), len(second["warnings"])) == (2, 0)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_input_is_refused_on_every_rank_with_the_file_and_a_remedy(verified, name):
    first, second = verified[name]
    assert first["required"] == second["required"]
    assert DAMAGES[name][1] in first["required"]
    assert first["required"].endswith(": put a copy that is whole in its place, or delete it and make it again")


def test_another_format_is_refused_on_every_rank_and_not_passed_over(verified):
    for rank in verified["format"]:
        assert rank["found"] is None and rank["warnings"] == []
        assert "step_00000008 has format 1, this version reads format 2" in rank["refused"]
        assert rank["required"] == rank["refused"]


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a disk of its own."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("mode", "files"),
    [
        ("synchronous", ["common.pt", "__0_0.distcp", ".metadata", "metadata.json", "manifest.json"]),
        ("asynchronous", ["__0_0.distcp"]),
    ],
)
def test_a_full_disk_is_told_by_every_rank_and_leaves_the_earlier_checkpoint_alone(tmp_path, mode, files):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("needs the right to mount a disk (root)")
    run_ranks(FULL_DISK, 1, str(disk), str(tmp_path), mode, *files, timeout=240)
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for file in files:
        found = first.pop(file)
        assert (found["type"], found["full"]) == ("OSError", True), (file, found)
        assert "No space left on device" in found["text"]
        assert found["left"] == [found["sound"]] == ["step_00000002"], file
    assert first == {"afterwards": {"sound": "step_00000004"}}


WRITING = """
import multiprocessing, time
from megatron.core.dist_checkpointing.strategies import filesystem_async
from nemo_rmt.megatron.writing import mended_writers

filesystem_async._write_item = lambda *arguments, **keys: time.sleep(60)
with mended_writers():
    keys = {"local_proc_idx": 0, "write_bucket": ("FILE", "FILE", ([], [(None, TENSOR)])), "results_queue": None}
    writer = multiprocessing.get_context("fork").Process(
        target=filesystem_async.FileSystemWriterAsync.write_preloaded_data,
        args=([],), kwargs={**keys, "count_queue": None, "use_fsync": True},
    )
    writer.start()
    print(writer.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_rank_leaves_no_writer_behind(tmp_path):
    code = WRITING.replace("FILE", str(tmp_path / "shard")).replace("TENSOR", "__import__('torch').zeros(1)")
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        writer = psutil.Process(int(rank.stdout.readline()))
        deadline = time.monotonic() + 20
        while not (tmp_path / "shard").exists():
            assert time.monotonic() < deadline, "the writer does not write"
            time.sleep(0.05)
        rank.kill()
    writer.wait(10)
