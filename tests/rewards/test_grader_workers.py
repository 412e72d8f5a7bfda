"""The worker processes: what they inherit, what they take along when they end, and what they cost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rewards import Grader, Problem
from rewards.grader import GraderError

PLUGINS = str(Path(__file__).with_name("plugins.py"))
TEXT = Problem(id="1", prompt="?", answer="good", source="data.jsonl:3", columns={"nums": [1, 2], "target": 3})
MODES = pytest.mark.parametrize("num_workers", [0, 2])


def name(function: str) -> str:
    return f"{PLUGINS}:{function}"


def is_alive(pid: int) -> bool:
    """False for a zombie too, which is dead and only waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_what_a_reward_prints_disturbs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Grader([name("prints")], num_workers=2) as grader:
        assert [result.reward for result in grader.grade([TEXT] * 4, ["a"] * 4)] == [1.0] * 4
        assert (grader.errors, grader.restarts) == (0, 0)
    assert capfd.readouterr() == ("", "")


def test_child_that_comes_back_is_no_second_worker() -> None:
    with Grader([name("forks")]) as grader:
        assert [result.reward for result in grader.grade([TEXT] * 3, ["good", "bad", "good"])] == [1.0] * 3
        assert [result.reward for result in grader.grade([TEXT] * 3, ["good", "bad", "good"])] == [1.0] * 3


def test_late_worker_takes_its_children_along(tmp_path: Path) -> None:
    with Grader([name("leaves_children")], timeout_s=2.0) as grader:
        (result,) = grader.grade([TEXT], [str(tmp_path / "pids")])
        assert result.status == "timeout"
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert wait_until(lambda: not any(map(is_alive, pids)))


def test_closing_ends_the_workers() -> None:
    with Grader([name("pid")], num_workers=2) as grader:
        pids = {int(result.reward or 0) for result in grader.grade([TEXT] * 64, ["a"] * 64)}
        assert pids
        assert all(map(is_alive, pids))
        assert os.getpid() not in pids
    assert not any(map(is_alive, pids))
    grader.close()
    with pytest.raises(GraderError, match="closed"):
        grader.grade([TEXT], ["a"])


def test_worker_that_died_between_batches_costs_nothing() -> None:
    with Grader([name("pid")]) as grader:
        (first,) = grader.grade([TEXT], ["a"])
        os.kill(int(first.reward or 0), signal.SIGKILL)
        assert wait_until(lambda: not is_alive(int(first.reward or 0)))
        (second,) = grader.grade([TEXT], ["a"])
        assert (second.status, grader.errors, grader.restarts) == ("ok", 0, 1)
        assert second.reward != first.reward
        os.kill(int(second.reward or 0), signal.SIGKILL)
        assert wait_until(lambda: not is_alive(int(second.reward or 0)))
        grader.load(["countdown"])
        assert grader.restarts == 2


def test_workers_are_in_a_session_of_their_own() -> None:
    """Ctrl-C in the terminal is for the parent, which saves its work first."""
    with Grader([name("pid")]) as grader:
        pid = int(grader.grade([TEXT], ["a"])[0].reward or 0)
        assert os.getsid(pid) == pid != os.getsid(0)


@pytest.mark.parametrize("function", ["length", "hang_in_c"])
def test_workers_end_when_the_parent_is_killed(function: str, tmp_path: Path) -> None:
    """Idle, and in the middle of a call that holds the interpreter's lock."""
    script = f"""
import sys, threading
from rewards import Grader, Problem
if __name__ == "__main__":
    grader = Grader([{name(function)!r}, {name("pid")!r}], num_workers=1, timeout_s=600)
    (result,) = grader.grade([Problem(id="1", prompt="?")], ["good"])
    print(int(result.breakdown["pid"]), flush=True)
    grader.grade([Problem(id="1", prompt="?")], ["bad"])
    sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    assert wait_until(lambda: not is_alive(worker))


def test_interrupted_batch_leaves_nothing_to_the_next() -> None:
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    with Grader([name("hang"), name("length")], timeout_s=60) as grader:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([TEXT] * 3, ["good", "bad", "good"])
        assert [result.reward for result in grader.grade([TEXT] * 2, ["abcde", ""])] == [6.0, 1.0]


def test_worker_imports_no_more_than_the_reward() -> None:
    with Grader([name("has_torch_or_sympy"), "countdown", "format"]) as grader:
        assert grader.grade([TEXT], ["a"])[0].breakdown["has_torch_or_sympy"] == 0.0


def test_imports_do_not_count_against_the_memory_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text("import mmap\nKEPT = mmap.mmap(-1, 1 << 30)\ndef f(problem, completion):\n    return 1.0\n")
    with Grader([f"{path}:f", name("eats_memory")], memory_mb=128, timeout_s=60) as grader:
        assert [result.reward for result in grader.grade([TEXT] * 2, ["good", "bad"])] == [2.0, 1.0]


def test_threads_of_a_reward_fit_into_the_memory_limit() -> None:
    with Grader([name("asks_32_threads")], memory_mb=512) as grader:
        assert grader.grade([TEXT], ["a"])[0].reward == 64.0


def test_workers_see_the_modules_that_the_parent_sees(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def one(problem, completion):\n    return 1.0\n")
    (tmp_path / "random.py").write_text("raise ImportError('a file of the folder shadows the standard library')")
    script = f"""
import sys
from rewards import Grader, Problem
sys.path.append({str(tmp_path)!r})
with Grader(["my_rewards:one"]) as grader:
    print(grader.grade([Problem(id="1", prompt="?")], ["a"])[0].reward)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_grading_costs_little() -> None:
    """256 completions under two cheap rewards; the bar of 50 ms is for an idle machine, this one catches a slip."""
    problems = [Problem(id=str(n), prompt="?", columns={"nums": [n, 2], "target": n + 2}) for n in range(16)]
    rows = [(problem, f"<think>{'hm ' * 300}</think> <answer>2+{problem.id}</answer>") for problem in problems] * 16
    rows.sort(key=lambda row: int(row[0].id))
    with Grader(["countdown", "format"], num_workers=2) as grader:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            results = grader.grade([row[0] for row in rows], [row[1] for row in rows])
            seconds.append(time.perf_counter() - started)
    assert all(result.reward == 2.0 for result in results)
    assert min(seconds) < 0.5, json.dumps(seconds)
