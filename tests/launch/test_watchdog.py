"""Who is to blame when a stage stands still."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemo_rmt import pulse
from nemo_rmt.launch.watchdog import Watchdog


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def beat(folder: Path, rank: int, beats: int, progress: int, doing: str = "a micro-batch") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{rank}.json").write_text(
        json.dumps({"pid": 10 + rank, "node": f"n{rank}", "beats": beats, "progress": progress, "doing": doing})
    )


def watch(folder: Path, seconds: int, says) -> list:
    """What a watchdog with a limit of 20 s says each second while ``says(second)`` writes the ranks' beats."""
    clock = Clock()
    dog, found = Watchdog(folder, 2, 20.0, clock), []
    for second in range(seconds):
        clock.now += 1.0
        says(second)
        found.append(dog.look())
    return found


def test_a_stage_that_progresses_on_any_rank_is_left_alone(tmp_path):
    def says(second):
        beat(tmp_path, 0, second, 5)  # waits for the other all the time
        beat(tmp_path, 1, second, second)

    assert not any(watch(tmp_path, 100, says))


def test_a_rank_that_no_longer_beats_is_named(tmp_path):
    def says(second):
        beat(tmp_path, 0, second, min(second, 10))
        if second <= 9:
            beat(tmp_path, 1, second, second, "sampling")

    found = watch(tmp_path, 40, says)
    first = next(index for index, hang in enumerate(found) if hang)
    assert first == 30  # 20 s after the last progress, which rank 0 made
    assert found[first].rank == 1
    assert found[first].reason == "rank 1 (node n1) has not responded for 21 s, last at 'sampling'"


def test_where_all_beat_the_one_furthest_behind_is_named_with_what_it_is_doing(tmp_path):
    def says(second):
        beat(tmp_path, 0, second, min(second, 8), "step 4")
        beat(tmp_path, 1, second, min(second, 7), "a micro-batch")

    hang = next(hang for hang in watch(tmp_path, 40, says) if hang)
    assert hang.rank == 1
    assert "no rank has made progress for 20 s" in hang.reason and "cluster.hang_timeout_s=20" in hang.reason
    assert "rank 1 (node n1) is furthest behind, at 'a micro-batch'" in hang.reason


def test_a_rank_that_never_began_is_named(tmp_path):
    hang = next(hang for hang in watch(tmp_path, 40, lambda second: beat(tmp_path, 0, second, 0)) if hang)
    assert hang.rank == 1 and "rank 1 has not responded" in hang.reason and "since it was started" in hang.reason


def test_files_of_a_killed_start_are_no_progress_and_torn_ones_are_passed_over(tmp_path):
    beat(tmp_path, 0, 7, 3)
    (tmp_path / "rank_1.json").write_text('{"pid": 1')
    assert set(pulse.read(tmp_path, 2)) == {0}


@pytest.mark.parametrize(("limit_s", "interval_s"), [(1200.0, 15.0), (100.0, 5.0), (1.0, 0.2)])
def test_there_are_several_beats_within_the_limit(limit_s, interval_s):
    assert pulse.beat_interval(limit_s) == interval_s


def test_a_pulse_says_what_is_done_and_leaves_the_first_reason_of_the_end(tmp_path):
    life = pulse.start(tmp_path / "beats", 3, 0.05)
    pulse.tick("sampling")
    deadline = time.monotonic() + 10
    while True:
        seen = pulse.read(tmp_path / "beats", 4)
        if 3 in seen and seen[3].beats > 3 and seen[3].doing == "sampling":
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    life.fail("OSError: no\nspace")
    life.fail("a later one")
    while (seen := pulse.read(tmp_path / "beats", 4)) == {} or seen[3].failure is None:
        assert time.monotonic() < deadline
    assert seen[3].failure == "OSError: no space"
