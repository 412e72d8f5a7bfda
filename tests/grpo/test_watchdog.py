"""The heartbeat and the watchdog: a step that takes too long is told apart, and shows where all threads are."""

import json
import os
import threading
import time
from pathlib import Path

from grpo.watchdog import Watchdog
from tests.full_disk import files_at_most


def watched(folder: Path, notes: list[str], steps: int = 3) -> Watchdog:
    """After some short steps, so that there is a median."""
    watchdog = Watchdog(folder, 0, notes.append, least_s=0.3)
    for number in range(1, steps + 1):
        watchdog.begin(number)
        watchdog.end()
    return watchdog


def hang_in_a_thread(event: threading.Event) -> None:
    event.wait()


def test_a_step_that_takes_too_long_leaves_the_stacks_of_all_threads(tmp_path: Path) -> None:
    notes: list[str] = []
    watchdog, event = watched(tmp_path, notes), threading.Event()
    other = threading.Thread(target=hang_in_a_thread, args=(event,))
    other.start()
    watchdog.begin(4)
    stacks = tmp_path / "stacks_rank0.txt"
    until = time.monotonic() + 30
    while "test_a_step_that_takes" not in stacks.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    event.set()
    other.join()
    watchdog.end()
    watchdog.close()
    text = stacks.read_text()
    assert "in hang_in_a_thread" in text
    assert "in test_a_step_that_takes_too_long" in text
    [note] = notes
    assert note.startswith("step 4 took ")
    assert f"{stacks} says what it was doing after 0.3 s" in note


def test_steps_in_time_leave_a_heartbeat_alone(tmp_path: Path) -> None:
    notes: list[str] = []
    watchdog = watched(tmp_path, notes, steps=5)
    watchdog.close()
    time.sleep(0.4)
    assert notes == []
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat_rank0.json"]
    beat = json.loads((tmp_path / "heartbeat_rank0.json").read_text())
    assert (beat["step"], beat["pid"], beat["limit_s"]) == (5, os.getpid(), 0.3)


def test_the_limit_is_ten_times_the_median_once_there_is_one(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 1, print, least_s=0.0)
    limits = []
    for number in range(1, 5):
        watchdog.begin(number)
        limits.append(watchdog.limit_s)
        time.sleep(0.05)
        watchdog.end()
    watchdog.close()
    assert limits[:3] == [None] * 3
    assert limits[3] is not None
    assert limits[3] >= 0.5


def test_a_first_step_is_watched_where_others_wait_for_it(tmp_path: Path) -> None:
    notes: list[str] = []
    watchdog = Watchdog(tmp_path, 0, notes.append, most_s=0.1)
    watchdog.begin(1)
    until, stacks = time.monotonic() + 30, tmp_path / "stacks_rank0.txt"
    while "test_a_first_step_is_watched" not in stacks.read_text() and time.monotonic() < until:
        time.sleep(0.02)
    watchdog.end()
    watchdog.close()
    assert "in test_a_first_step_is_watched" in stacks.read_text()
    [note] = notes
    assert note.startswith("step 1 took ")
    assert note.endswith("says what it was doing after 0.1 s")


def test_no_step_is_watched_for_longer_than_others_wait(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, print, most_s=20.0)
    for number in range(1, 4):
        watchdog.begin(number)
        watchdog.end()
    assert watchdog.limit_s == 20.0, "not 30"
    watchdog.close()


def test_a_full_disk_costs_the_heartbeat_alone_and_is_said_once(tmp_path: Path) -> None:
    notes: list[str] = []
    with files_at_most(10):
        watched(tmp_path, notes, steps=5).close()
    assert notes == ["heartbeat could not be written (File too large); the run goes on without it"]
