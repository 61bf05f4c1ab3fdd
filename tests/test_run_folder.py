"""State survives, writes are whole or not at all, one process owns a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from nemo_rmt.errors import UserError
from nemo_rmt.run_folder import (
    RunFolder,
    State,
    check_space,
    check_writable,
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
