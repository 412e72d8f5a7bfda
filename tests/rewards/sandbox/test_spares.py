"""Children that wait: fresh for every run, within that run's limits, idle, and of no consequence when they die."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import score_program
from rewards.sandbox.limits import Limits
from rewards.sandbox.programs import run_with_input
from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError
from rewards.sandbox.spares import MAX_SPARES
from tests.rewards.attacks.world import find_descendants, wait_for_no_descendants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail's walls are Linux's")

ADD = {"style": "stdio", "cases": [{"stdin": "3 4", "stdout": "7"}], "limits": {"wall_s": 30}}
RIGHT = "print(sum(map(int, input().split())))"
WRITE_4_MIB = "open('f', 'wb').write(bytes(4 << 20))\nprint(7)"


@pytest.fixture(scope="module", params=["A", "B"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        with Sandbox(level=request.param, workers=1) as made:
            assert made.level == request.param
            yield made
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    assert wait_for_no_descendants() == []


def said(sandbox: Sandbox, program: str) -> str:
    run = run_with_input(sandbox, {"mode": "stdio", "program": program}, b"", Limits(wall_s=30))
    assert run.outcome.exit_code == 0, run.stderr
    return run.stdout.decode()


def waiting() -> list[int]:
    """The children that wait for a run, while none is under way: the leaves of the tree of processes."""
    family = find_descendants()
    parents = set()
    for pid in family:
        try:
            parents.add(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
        except FileNotFoundError:
            continue
    return [pid for pid in family if pid not in parents]


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_every_run_is_a_process_of_its_own(sandbox: Sandbox) -> None:
    program = "import sys\nprint(getattr(sys, 'seen', 'never'))\nsys.seen = 'before'"
    assert {said(sandbox, program) for _ in range(10)} == {"never\n"}


def test_chance_is_not_shared_between_runs(sandbox: Sandbox) -> None:
    program = "import random\nprint(random.random())"
    assert len({said(sandbox, program) for _ in range(6)}) == 6


def test_enough_wait_for_a_request_like_the_last_and_never_more_than_two(sandbox: Sandbox) -> None:
    tests = {"style": "assert", "entry_point": "f", "tests": "assert f() == 1", "limits": {"wall_s": 30}}
    assert score_program("def f(): return 1", tests, sandbox=sandbox).reward == 1.0
    assert len(waiting()) == MAX_SPARES == 2
    for disk_mb in (8, 9, 10, 11):
        assert score_program(RIGHT, ADD, sandbox=sandbox, limits={"disk_mb": disk_mb}).reward == 1.0
        assert 1 <= len(waiting()) <= MAX_SPARES


def test_the_limits_are_those_of_the_run_and_not_of_the_one_before(sandbox: Sandbox) -> None:
    writes = {"style": "stdio", "cases": [{"stdin": "", "stdout": "7"}]}
    slow = "import time\ntime.sleep(0.1)\n"  # where the folder's size is watched, not mounted
    for disk_mb, reward in ((64, 1.0), (1, 0.0), (64, 1.0), (1, 0.0), (1, 0.0), (64, 1.0)):
        result = score_program(
            WRITE_4_MIB + "\n" + slow, writes, sandbox=sandbox, limits={"disk_mb": disk_mb, "wall_s": 30}
        )
        assert result.reward == reward, result.detail
    grow = "x = bytearray(200 << 20)\nprint(7)"
    for memory_mb, reward in ((512, 1.0), (64, 0.0), (512, 1.0)):
        result = score_program(grow, writes, sandbox=sandbox, limits={"memory_mb": memory_mb, "wall_s": 30})
        assert result.reward == reward, result.detail


def test_time_counts_from_the_request_and_not_from_the_fork(sandbox: Sandbox) -> None:
    assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
    time.sleep(1.2)
    result = score_program(f"import time\ntime.sleep(0.2)\n{RIGHT}", ADD, sandbox=sandbox, limits={"wall_s": 1.0})
    assert result.reward == 1.0, result.detail
    started = time.monotonic()
    assert score_program("while True: pass", ADD, sandbox=sandbox, limits={"wall_s": 0.5}).status == "timeout"
    assert 0.5 <= time.monotonic() - started < 5


def test_waiting_takes_no_processor_time(sandbox: Sandbox) -> None:
    assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
    time.sleep(0.3)
    before = {pid: processor_ticks(pid) for pid in waiting()}
    time.sleep(0.5)
    assert before
    assert {pid: processor_ticks(pid) for pid in before} == before


def test_one_killed_while_it_waits_is_not_missed(sandbox: Sandbox) -> None:
    for pause_s in (0.2, 0.0, 0.0):
        assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
        for pid in waiting():
            os.kill(pid, signal.SIGKILL)
        time.sleep(pause_s)
        for _ in range(2):
            result = score_program(RIGHT, ADD, sandbox=sandbox)
            assert (result.reward, result.status) == (1.0, "ok"), result.detail


def test_one_stopped_while_it_waits_costs_no_more_than_the_deadline(sandbox: Sandbox) -> None:
    assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
    for pid in waiting():
        os.kill(pid, signal.SIGSTOP)
    while score_program(RIGHT, ADD, sandbox=sandbox, limits={"wall_s": 0.3}).status == "timeout":
        pass
    assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0


@pytest.mark.skipif(os.geteuid() != 0, reason="a child's descriptors are its own business")
def test_one_that_waits_holds_nothing_of_the_trainers(sandbox: Sandbox) -> None:
    assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
    time.sleep(0.2)
    for pid in waiting():
        descriptors = {n: os.readlink(f"/proc/{pid}/fd/{n}") for n in sorted(os.listdir(f"/proc/{pid}/fd"))}
        assert list(descriptors.values())[:2] == ["/dev/null", "/dev/null"]
        assert len(descriptors) == 4, descriptors
        assert sum(target.startswith("socket:") for target in descriptors.values()) == 1
