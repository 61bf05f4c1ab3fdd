"""One stage's ranks from their start to their end: on the node that leads, and on those that follow."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_rmt import stopping
from nemo_rmt.config import Cluster, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DISK_FULL, DIVERGED, DONE, FAILED, STOPPED, WRONG_INPUT
from nemo_rmt.launch.meeting import Call, Meeting, Seat
from nemo_rmt.launch.placement import Placement
from nemo_rmt.launch.ranks import Ranks, worker_environment
from nemo_rmt.launch.watchdog import Hang, Watchdog
from nemo_rmt.pulse import BEATS, Beat

SETTLE_S = 1.0
"""Seconds between the first rank that fails and the end of the others: the one to blame may be noticed second."""
LEAVE_S = 30.0
"""Seconds the other ranks get to leave when one has stopped on request, and a rank that failed gets to end."""
ASKED = (STOPPED, *(-signum for signum in stopping.REQUESTS))
"""Exit statuses after a request to stop; the signals themselves where they came before a rank took them as requests."""

Command = Callable[[Path], list[str]]
"""The command line of one rank, from its stage.yaml."""


@dataclass(frozen=True)
class Outcome:
    """How a stage's ranks ended, as one of ``nemo_rmt.exit_codes``."""

    status: int
    reason: str = ""
    """One line, naming the rank."""
    rank: int = 0
    """The rank whose log tells more."""


def run_stage(stage_yaml: Path, recipe: Recipe, command: Command, meeting: Meeting, lock: int) -> Outcome:
    """Start a stage's ranks on every node of the meeting and wait for their end.

    lock: file descriptor of the run's lock, which this node's ranks inherit. A request to stop is handed to the ranks.
    Returns at the latest a minute after a rank failed, or after cluster.hang_timeout_s without progress.
    """
    world_size = recipe.cluster.nodes * recipe.cluster.gpus_per_node
    beats = stage_yaml.parent / BEATS
    shutil.rmtree(beats, ignore_errors=True)
    call = meeting.call(stage_yaml)
    watchdog = Watchdog(beats, world_size, recipe.cluster.hang_timeout_s)
    with stopping.waiting():
        with _ranks(stage_yaml, recipe, command, 0, call, (lock,)) as ranks:
            hang = _watch(ranks, meeting, watchdog, world_size)
        ended = ranks.ended()
        meeting.stop()
        meeting.wait_until_over()
        ended |= meeting.ended()
    return judge(ended, world_size, watchdog.read(), hang)


def run_alone(stage_yaml: Path, recipe: Recipe, command: Command, meeting: Meeting, lock: int) -> Outcome:
    """``run_stage`` with one process on this node, for a stage that only writes files."""
    cluster = Cluster(threads=recipe.cluster.threads, hang_timeout_s=recipe.cluster.hang_timeout_s)
    alone = Meeting(meeting.run_dir, Placement())
    return run_stage(stage_yaml, recipe.model_copy(update={"cluster": cluster}), command, alone, lock)


def _watch(ranks: Ranks, meeting: Meeting, watchdog: Watchdog, world_size: int) -> Hang | None:
    """Wait until all ranks have ended, or those left have to be ended; why, if it is a hang."""
    asked, deadline = False, float("inf")
    while True:
        if stopping.requested() and not asked:
            asked = True
            ranks.send(signal.SIGUSR1)
        ended = ranks.ended() | meeting.ended()
        if len(ended) == world_size or time.monotonic() > deadline:
            return None
        if any(status not in (DONE, STOPPED) for status in ended.values()):
            deadline = min(deadline, time.monotonic() + SETTLE_S)
        elif any(status == STOPPED for status in ended.values()):
            deadline = min(deadline, time.monotonic() + LEAVE_S)
        if (hang := watchdog.look()) is not None:
            return hang
        if any(beat.failure for beat in watchdog.beats.values()):
            deadline = min(deadline, time.monotonic() + LEAVE_S)  # leaving the process group may hang
        time.sleep(meeting.placement.poll_s)


def judge(ended: dict[int, int], world_size: int, beats: dict[int, Beat], hang: Hang | None) -> Outcome:
    """What happened, from the exit statuses of the ranks that ended by themselves and the reasons they left.

    One failing rank makes others fail, which lose their connection to it. What a rank decided itself comes first, then
    a rank that was killed, which leaves no reason, then the reason that was left first.
    """
    reasons = {rank: beat.failure for rank, beat in beats.items() if beat.failure is not None}
    for status in (WRONG_INPUT, DIVERGED, DISK_FULL):
        for rank in sorted(ended):
            if ended[rank] == status:
                return Outcome(status, f"{_name(beats, rank)}: {reasons.get(rank, f'exit status {status}')}", rank)
    if hang is not None:
        return Outcome(FAILED, hang.reason, hang.rank)
    if any(status in ASKED for status in ended.values()):
        return Outcome(STOPPED)
    if len(ended) == world_size and not any(ended.values()):
        return Outcome(DONE)
    for rank, status in sorted(ended.items()):
        if status < 0:
            name = signal.Signals(-status).name
            guess = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return Outcome(FAILED, f"{_name(beats, rank)} was killed by {name}{guess}", rank)
    if reasons:
        rank = min(reasons, key=lambda each: beats[each].failed_at)
        return Outcome(FAILED, f"{_name(beats, rank)}: {reasons[rank]}", rank)
    rank = next((rank for rank in sorted(ended) if ended[rank]), 0)
    return Outcome(FAILED, f"{_name(beats, rank)} ended with exit status {ended.get(rank, 'unknown')}", rank)


def _name(beats: dict[int, Beat], rank: int) -> str:
    return f"rank {rank} (node {beats[rank].node})" if rank in beats else f"rank {rank}"


def follow(run_dir: Path, recipe: Recipe, command: Command, placement: Placement, check: Callable[[], None]) -> int:
    """Start this node's ranks whenever the leader calls, until it is over; returns DONE, whatever became of them.

    check: raises UserError when this node cannot take part, which the leader then reports. The leader alone follows
    requests to stop: its ranks tell the others.
    """
    seat = Seat(run_dir, placement)
    with stopping.waiting():
        error = ""
        try:
            check()
        except UserError as refused:
            error = str(refused)
        seat.take(error)
        try:
            for number, call in seat.calls():
                _answer(seat, number, call, recipe, command)
        finally:
            seat.leave()
    return DONE


def _answer(seat: Seat, number: int, call: Call, recipe: Recipe, command: Command) -> None:
    reported: dict[int, int] = {}
    with _ranks(Path(call.stage_yaml), recipe, command, seat.placement.node, call) as ranks:
        while len(reported) < len(ranks.processes) and not seat.is_stopped(number):
            if (ended := ranks.ended()) != reported:
                reported = ended
                seat.report(number, reported, over=False)
            time.sleep(seat.placement.poll_s)
        reported = ranks.ended()
    seat.report(number, reported, over=True)


def _ranks(
    stage_yaml: Path, recipe: Recipe, command: Command, node: int, call: Call, keep_open: tuple[int, ...] = ()
) -> Ranks:
    count = recipe.cluster.gpus_per_node
    return Ranks(
        command(stage_yaml),
        worker_environment(recipe),
        range(node * count, (node + 1) * count),
        world_size=recipe.cluster.nodes * count,
        address=call.address,
        port=call.port,
        log=stage_yaml.parent / "log",
        keep_open=keep_open,
    )
