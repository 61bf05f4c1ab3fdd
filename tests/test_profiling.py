"""Where time goes: every second counts to one part, a trace is left, and a profile that fails costs nothing else."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
from itertools import accumulate, repeat

import pytest

from nemo_rmt import profiling
from nemo_rmt.profiling import PARTS, TABLE, TRACE, part, process_age, stage, step


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to: ``clock(seconds)``. The process is 2 seconds old as it starts."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(profiling, "process_age", lambda: 2.0)

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def parts(folder) -> dict:
    return json.loads((folder / PARTS).read_text())


def test_an_inner_part_is_not_counted_to_the_outer_one_and_what_no_part_counts_is_other(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(profiling, "WARM_UP", 100)
    with stage(tmp_path, "0/rl", enabled=True):
        clock(3)
        with part("scoring"):
            clock(5)
        for _ in range(2):
            step()
            with part("rollout"):
                clock(1)
                with part("scoring"):
                    clock(10)
                clock(0.5)
            clock(0.25)
    found = parts(tmp_path)
    assert found["seconds"] == {"scoring": 25.0, "start": 5.0, "rollout": 3.0, "other": 0.5}
    assert found["before_first_step"] == {"scoring": 5.0, "start": 5.0}
    assert found["steps"] == 2 and found["total_s"] == 33.5
    rows = {line.split()[0]: line.split()[1:] for line in (tmp_path / TABLE).read_text().splitlines() if line}
    assert rows["scoring"] == ["25.00", "74.6%", "5.00", "10000.00"]
    assert rows["start"] == ["5.00", "14.9%"]


def test_a_stage_without_steps_is_at_work_from_its_first_part_on(tmp_path, clock):
    with stage(tmp_path, "0/data", enabled=True):
        clock(0.5)
        with part("data"):
            clock(4)
        clock(1)
    assert parts(tmp_path)["seconds"] == {"data": 4.0, "start": 2.5, "other": 1.0}
    assert "per step" not in (tmp_path / TABLE).read_text()


def test_a_part_ends_with_an_exception_and_a_stage_that_fails_leaves_its_profile(tmp_path, clock):
    with pytest.raises(KeyError), stage(tmp_path, "0/rl", enabled=True):
        with pytest.raises(ValueError), part("data"):
            clock(1)
            raise ValueError
        clock(2)
        raise KeyError
    assert parts(tmp_path)["seconds"] == {"start": 2.0, "other": 2.0, "data": 1.0}


def test_other_threads_do_not_count(tmp_path, clock):
    def elsewhere():
        with part("checkpoint"):
            clock(7)

    with stage(tmp_path, "0/rl", enabled=True), part("data"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert parts(tmp_path)["seconds"] == {"data": 7.0, "start": 2.0, "other": 0.0}


def test_traced_steps_are_the_profilers_alone(tmp_path, clock):
    torch = pytest.importorskip("torch")
    with stage(tmp_path, "0/rl", enabled=True):
        for _ in range(profiling.WARM_UP + profiling.TRACED + 2):
            step()
            with part("forward_backward"):
                torch.ones(4).exp()
                clock(1)
    found = parts(tmp_path)
    assert found["traced_steps"] == [4, 5] and found["steps"] == 5
    assert found["seconds"]["forward_backward"] == 5.0 and found["seconds"]["profiler"] == 2.0
    names = [event["name"] for event in json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))["traceEvents"]]
    assert names.count("aten::exp") == profiling.TRACED


def test_a_stage_that_ends_within_the_trace_has_it_too(tmp_path):
    with stage(tmp_path, "0/rl", enabled=True):
        for _ in range(profiling.WARM_UP + 1):
            step()
    assert (tmp_path / TRACE).is_file() and parts(tmp_path)["traced_steps"] == [4]


def test_a_profiler_that_fails_costs_the_trace_alone(tmp_path, monkeypatch, caplog):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.profiler, "profile", lambda: 1 / 0)
    with stage(tmp_path, "0/rl", enabled=True):
        for _ in range(profiling.WARM_UP + 3):
            step()
    assert parts(tmp_path)["steps"] == profiling.WARM_UP + 3 and not (tmp_path / TRACE).exists()
    assert "torch.profiler failed" in caplog.text


def test_a_profile_that_cannot_be_written_costs_nothing_else(tmp_path, caplog):
    (tmp_path / "profile").write_text("no folder")
    with stage(tmp_path, "0/rl", enabled=True):
        pass
    assert "0/rl: the profile could not be written" in caplog.text


def test_nothing_is_measured_or_written_unasked(tmp_path):
    with stage(tmp_path, "0/rl", enabled=False), part("data"):
        step()
    assert list(tmp_path.iterdir()) == []
    assert part("data") is part("rollout")  # one object that does nothing


def test_importing_it_imports_no_torch():
    program = "import sys, nemo_rmt.profiling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_age_of_a_process_grows_from_its_start():
    lived = "import time; time.sleep(0.2); from nemo_rmt.profiling import process_age; print(process_age())"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", lived], check=True, capture_output=True, text=True)
    assert 0.18 < float(done.stdout) < time.perf_counter() - began + 0.02
    ages = list(accumulate(repeat(None, 3), lambda age, _: process_age(), initial=process_age()))
    assert ages == sorted(ages)
