"""State survives, checkpoints are complete or refused, one process owns a run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

import pytest
from fake_checkpoint import write_checkpoint

from nemo_rmt.config import Model
from nemo_rmt.errors import UserError
from nemo_rmt.run_folder import (
    RunFolder,
    State,
    check_space,
    check_writable,
    inspect_checkpoint,
    latest_checkpoint,
    write_json,
    write_text,
)


def test_state_is_read_back_as_it_was_saved(tmp_path):
    state = State("digest")
    record = state.record(1, "anneal")
    record.status, record.id, record.inputs = "done", "a", {"checkpoint": "b"}
    RunFolder(tmp_path).save_state(state)
    assert RunFolder(tmp_path).load_state() == state
    assert json.loads((tmp_path / "state.json").read_text())["iterations"][1]["anneal"]["status"] == "done"


def test_a_run_that_has_not_started_has_no_state(tmp_path):
    assert RunFolder(tmp_path / "nothing").load_state() is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"recipe": "x"}', '{"recipe": "x", "iterations": [{"data": {"colour": 1}}]}']
)
def test_a_damaged_state_is_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match="state.json is damaged"):
        RunFolder(tmp_path).load_state()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", '{"status": "running"}'])
def test_a_result_counts_only_when_it_says_done(tmp_path, text):
    run = RunFolder(tmp_path)
    run.stage_dir(0, "sft").mkdir(parents=True)
    (run.stage_dir(0, "sft") / "result.json").write_text(text)
    assert run.result(0, "sft") is None


def test_a_whole_checkpoint_is_described(tmp_path):
    info = inspect_checkpoint(write_checkpoint(tmp_path / "step_00000040", Model().model_dump()))
    assert (info.step, info.vocab_size, info.model["num_layers"]) == (40, 512, 4)


def test_a_truncated_file_of_a_checkpoint_is_named_with_both_sizes(tmp_path):
    folder = write_checkpoint(tmp_path / "c", Model().model_dump())
    (folder / "weights.distcp").write_bytes(b"w" * 10)
    with pytest.raises(UserError, match="weights.distcp has 10 bytes instead of 1000"):
        inspect_checkpoint(folder)
    (folder / "weights.distcp").unlink()
    with pytest.raises(UserError, match="weights.distcp is missing"):
        inspect_checkpoint(folder)


def test_what_is_no_checkpoint_is_refused_with_a_hint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nothing")
    folder = write_checkpoint(tmp_path / "checkpoints" / "step_00000040", Model().model_dump())
    with pytest.raises(UserError, match="give one of them, for example .*step_00000040"):
        inspect_checkpoint(tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        inspect_checkpoint(folder)


def test_the_latest_checkpoint_is_the_newest_whole_one(tmp_path, caplog):
    steps = [
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", Model().model_dump(), step=step)
        for step in (100, 200, 300)
    ]
    write_checkpoint(tmp_path / "checkpoints" / "step_00000400.tmp", Model().model_dump(), step=400)
    assert latest_checkpoint(tmp_path) == steps[2]
    (steps[2] / "weights.distcp").unlink()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == steps[1]
    assert "step_00000300" in caplog.text
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_a_locked_run_refuses_a_second_start_and_names_the_holder(tmp_path):
    with RunFolder(tmp_path).lock():
        with pytest.raises(UserError, match=f"in use by another nemo-rmt .process {os.getpid()}"):
            with RunFolder(tmp_path).lock(wait_s=0.2):
                pytest.fail("two owners")
    with RunFolder(tmp_path).lock(wait_s=0.2):
        pass


def test_the_lock_stays_while_an_orphaned_worker_lives(tmp_path):
    with RunFolder(tmp_path).lock() as descriptor:
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=(descriptor,))
    started = time.monotonic()
    with RunFolder(tmp_path).lock(wait_s=20):
        assert orphan.wait(5) == 0
        assert time.monotonic() - started > 0.3


def test_writing_is_tried_and_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not writable.*choose another run_dir"):
        check_writable(tmp_path / "file" / "run")


def test_missing_disk_space_is_told_with_both_numbers(tmp_path):
    check_space(tmp_path / "run", 1)
    with pytest.raises(UserError, match=r"[\d.]+ [GM]iB free, the run needs about 1048576.0 GiB"):
        check_space(tmp_path / "run", 2**50)


def test_discarding_a_stage_removes_its_folder_alone(tmp_path):
    run = RunFolder(tmp_path)
    for stage in ("sft", "rl"):
        run.stage_dir(0, stage).mkdir(parents=True)
    run.discard(0, "sft")
    run.discard(0, "evaluate")
    assert os.listdir(tmp_path / "iteration_000") == ["rl"]
