"""Levels, and what happens when something other than the program goes wrong: a clear report and no wrong score."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewards import score_program
from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError
from tests.rewards.attacks.world import find_descendants, wait_for_no_descendants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail's walls are Linux's")

ROOT = Path(__file__).resolve().parents[3]
ADD = {"style": "stdio", "cases": [{"stdin": "3 4", "stdout": "7"}], "limits": {"wall_s": 30}}
RIGHT = "print(sum(map(int, input().split())))"


def available_levels() -> list[str]:
    found = []
    for level in ("A", "B", "C", "D"):
        try:
            with Sandbox(level=level, minimum_level="D", packages=()) as sandbox:
                found.append(sandbox.level)
        except SandboxUnavailableError:
            continue
    return found


@pytest.mark.parametrize("level", ["A", "B", "C", "D"])
def test_every_level_scores_alike(level: str) -> None:
    if level not in available_levels():
        pytest.skip(f"level {level} is not to be had here")
    with Sandbox(level=level, minimum_level="D") as sandbox:
        assert sandbox.level == level
        assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
        assert score_program("print(8)", ADD, sandbox=sandbox).reward == 0.0
        assert (
            score_program("while True: pass", {**ADD, "limits": {"wall_s": 0.3}}, sandbox=sandbox).status == "timeout"
        )


def test_the_strongest_level_is_taken() -> None:
    with Sandbox(minimum_level="D") as sandbox:
        assert sandbox.level == available_levels()[0]


def test_a_level_below_the_minimum_is_refused_by_name() -> None:
    with pytest.raises(SandboxUnavailableError, match=r"sandbox\.minimum_level B"):
        Sandbox(level="C")
    with pytest.raises(ValueError, match=r"sandbox\.level must be one of A, B, C, D, got 'E'"):
        Sandbox(level="E")  # type: ignore[arg-type]


def run_python(source: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


WITHOUT = """
    import errno, platform, struct
    from rewards.sandbox import linux, seccomp
    from rewards.sandbox.syscalls import syscall_number
    def forbid(name, error):
        # Load the call's number; if it is this one, fail so; else go on.
        number = syscall_number(name)
        program = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.install_filter(b"".join(struct.pack("<HBBI", *step) for step in program), 0)
"""


def test_a_machine_without_landlock_is_refused_and_told_why() -> None:
    answer = run_python(
        WITHOUT
        + """
    forbid("landlock_create_ruleset", errno.ENOSYS)
    from rewards import score_program
    from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError
    problem = {"style": "stdio", "cases": [{"stdin": "", "stdout": "7"}]}
    try:
        print("scored", score_program("print(7)", problem))
    except SandboxUnavailableError as error:
        print(error)
    with Sandbox(minimum_level="C") as sandbox:
        print(sandbox.level, score_program("print(7)", problem, sandbox=sandbox).reward)
    """
    )
    refusal, accepted = answer.stdout.splitlines()
    assert refusal.startswith("no sandbox at level A or B on this machine (A: ")
    assert "landlock_create_ruleset: Function not implemented" in refusal
    assert "sandbox.minimum_level" in refusal
    assert accepted == "C 1.0"


def test_a_container_without_namespaces_gets_level_b() -> None:
    answer = run_python(
        WITHOUT
        + """
    forbid("unshare", errno.EPERM)
    from rewards import score_program
    from rewards.sandbox.sandbox import Sandbox
    problem = {"style": "stdio", "cases": [{"stdin": "", "stdout": "7"}]}
    with Sandbox() as sandbox:
        print(sandbox.level, score_program("print(7)", problem, sandbox=sandbox).reward)
        print(sandbox.reasons["A"])
    """
    )
    assert answer.stdout.splitlines() == ["B 1.0", "PermissionError: [Errno 1] unshare: Operation not permitted"]


def test_many_threads_get_their_own_answers() -> None:
    with Sandbox(workers=3) as sandbox, ThreadPoolExecutor(8) as threads:

        def score(number: int) -> float | None:
            problem = {"style": "stdio", "cases": [{"stdin": f"{number}", "stdout": f"{number * 7}"}]}
            return score_program("print(int(input()) * 7)", problem, sandbox=sandbox).reward

        assert list(threads.map(score, range(60))) == [1.0] * 60
        assert len(sandbox._idle) <= 3


def test_a_forked_worker_has_a_sandbox_of_its_own() -> None:
    answer = run_python(
        """
        import os
        from rewards import score_program
        problem = {"style": "stdio", "cases": [{"stdin": "3 4", "stdout": "7"}]}
        right = "print(sum(map(int, input().split())))"
        assert score_program(right, problem).reward == 1.0
        children = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                rewards = [score_program(right, problem).reward for _ in range(20)]
                os._exit(0 if rewards == [1.0] * 20 else 1)
            children.append(pid)
        rewards = [score_program(right, problem).reward for _ in range(20)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(set(rewards), statuses)
        """
    )
    assert answer.stdout == "{1.0} [0, 0]\n", answer.stderr


@pytest.mark.parametrize("level", ["A", "B"])
def test_a_supervisor_that_is_killed_is_replaced(level: str) -> None:
    if level not in available_levels():
        pytest.skip(f"level {level} is not to be had here")
    with Sandbox(level=level, workers=1) as sandbox:
        assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
        problem = {**ADD, "cases": [{"stdin": "3 4", "stdout": "7"}] * 3}
        slow = "import time\ntime.sleep(0.4)\n" + RIGHT
        with ThreadPoolExecutor(1) as threads:
            before = set(find_descendants())
            scored = threads.submit(score_program, slow, problem, sandbox=sandbox)
            time.sleep(0.2)
            # Parents first: a supervisor that outlived the child forked ahead for it would report that child's death.
            for pid in sorted(before & set(find_descendants())):
                os.kill(pid, signal.SIGKILL)
            assert scored.result().reward == 1.0
    assert wait_for_no_descendants() == []


def test_two_dead_supervisors_are_reported_and_not_scored() -> None:
    with Sandbox(workers=1) as sandbox:
        assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
        stop = threading.Event()

        def keep_killing() -> None:
            while not stop.wait(0.02):
                for pid in find_descendants():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=keep_killing)
        killer.start()
        try:
            result = score_program("import time\ntime.sleep(3)\nprint(7)", ADD, sandbox=sandbox)
        except SandboxUnavailableError as error:
            # Killed while it was starting: refused just as clearly.
            assert "supervisor is gone" in str(error)  # noqa: PT017
        else:
            assert (result.reward, result.status) == (None, "error")
            assert "supervisor is gone" in result.detail
        finally:
            stop.set()
            killer.join()


@pytest.mark.parametrize("level", ["A", "B"])
def test_nothing_outlives_a_trainer_that_is_killed(level: str) -> None:
    if level not in available_levels():
        pytest.skip(f"level {level} is not to be had here")
    source = f"""
        from concurrent.futures import ThreadPoolExecutor
        from rewards import score_program
        from rewards.sandbox.sandbox import Sandbox
        problem = {{"style": "stdio", "cases": [{{"stdin": "", "stdout": ""}}], "limits": {{"wall_s": 60}}}}
        sandbox = Sandbox(level={level!r}, workers=2)
        with ThreadPoolExecutor(2) as threads:
            for _ in range(2):
                threads.submit(score_program, "while True: pass", problem, sandbox=sandbox)
        """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], cwd=ROOT)
    deadline = time.monotonic() + 30
    # The trainer, two supervisors (twice two processes at level A) and two programs.
    while len(find_descendants()) < (7 if level == "A" else 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = find_descendants()
    assert len(family) >= 5
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in family if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_scratch_disk_is_reported_and_not_scored(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "small", str(tmp_path)], check=True)
    try:
        with Sandbox(level="B", scratch_dir=str(tmp_path)) as sandbox:
            assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
            (tmp_path / "filler").write_bytes(bytes(70 << 20))
            result = score_program(RIGHT, ADD, sandbox=sandbox)
            assert (result.reward, result.status) == (None, "error")
            assert "make room there, lower limits.disk_mb or choose another sandbox.scratch_dir" in result.detail
            small = score_program(RIGHT, ADD, sandbox=sandbox, limits={"disk_mb": 1})
            assert small.reward == 1.0
            (tmp_path / "filler").unlink()
            assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_missing_scratch_folder_is_reported() -> None:
    with Sandbox(level="B", scratch_dir="/nonexistent") as sandbox, pytest.raises(SandboxUnavailableError) as caught:
        score_program(RIGHT, ADD, sandbox=sandbox)
    assert "no scratch folder can be made in /nonexistent" in str(caught.value)


def test_no_descriptor_is_left_after_errors() -> None:
    with Sandbox(workers=1) as sandbox:
        score_program(RIGHT, ADD, sandbox=sandbox)
        before = len(os.listdir("/proc/self/fd"))
        for program in (RIGHT, "print(", "import os; os._exit(3)", "while True: pass", "x = bytearray(1 << 40)"):
            for style in (ADD, {"style": "assert", "entry_point": "f", "tests": "assert f() == 1"}):
                score_program(program, style, sandbox=sandbox, limits={"wall_s": 0.3})
        assert len(os.listdir("/proc/self/fd")) == before


def test_closing_ends_everything_at_once() -> None:
    sandbox = Sandbox(workers=2)
    score_program(RIGHT, ADD, sandbox=sandbox)
    started = time.monotonic()
    sandbox.close()
    assert wait_for_no_descendants() == []
    assert time.monotonic() - started < 10


def test_closing_ends_a_run_under_way_and_is_for_good() -> None:
    sandbox = Sandbox(workers=2)
    assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
    with ThreadPoolExecutor(2) as threads:
        scored = [threads.submit(score_program, "while True: pass", ADD, sandbox=sandbox) for _ in range(2)]
        time.sleep(0.5)
        started = time.monotonic()
        sandbox.close()
        results = [future.result() for future in scored]
        assert time.monotonic() - started < 10
    for result in (*results, score_program(RIGHT, ADD, sandbox=sandbox)):
        assert (result.reward, result.status) == (None, "error")
        assert result.detail == "not judged: the sandbox is closed"
    assert wait_for_no_descendants() == []


def test_a_forked_worker_that_closes_harms_nobody() -> None:
    with Sandbox(level=available_levels()[-1], minimum_level="D", workers=1) as sandbox:
        assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
        zygotes = find_descendants()
        pid = os.fork()
        if pid == 0:
            try:
                sandbox.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert score_program(RIGHT, ADD, sandbox=sandbox).reward == 1.0
        assert zygotes[0] in find_descendants()


def test_no_descriptor_to_spare_is_reported_and_not_scored() -> None:
    answer = run_python(
        f"""
        import os, resource
        from rewards import score_program
        from rewards.sandbox.sandbox import Sandbox
        sandbox = Sandbox(workers=1)
        assert score_program({RIGHT!r}, {ADD!r}, sandbox=sandbox).reward == 1.0
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        add = {{"style": "function", "entry_point": "add", "cases": [{{"args": [3, 4], "expected": 7}}]}}
        for program, problem in (({RIGHT!r}, {ADD!r}), ("def add(a, b): return a + b", add)):
            held, found = [], []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
            for _ in range(8):
                result = score_program(program, problem, sandbox=sandbox)
                found.append((result.reward, result.status))
                os.close(held.pop())
            print(found[0], found[-1], sorted(map(str, set(found))))
            for descriptor in held:
                os.close(descriptor)
        """
    )
    error, right = str((None, "error")), str((1.0, "ok"))
    assert answer.stdout.splitlines() == [f"{error} {right} {[right, error]}"] * 2, answer.stderr


def test_an_exit_without_closing_leaves_nothing(tmp_path: Path) -> None:
    answer = run_python(
        f"""
        import json
        from rewards import score_program
        from rewards.sandbox.sandbox import Sandbox
        from tests.rewards.attacks.world import find_descendants
        sandbox = Sandbox(level="B", scratch_dir={str(tmp_path)!r})
        problem = {{"style": "stdio", "cases": [{{"stdin": "", "stdout": "7"}}]}}
        assert score_program("print(7)", problem, sandbox=sandbox).reward == 1.0
        print(json.dumps(find_descendants()))
        """
    )
    pids = json.loads(answer.stdout)
    assert pids
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []
    assert os.listdir(tmp_path) == []
