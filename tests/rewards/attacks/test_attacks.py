"""Every attack holds, at each level this machine offers, as whoever runs the tests and as an ordinary user."""

from __future__ import annotations

import functools
import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError
from tests.rewards.attacks.drive import ATTACKS, run_suite
from tests.rewards.attacks.files import PLANT_AND_LOOK

ROOT = Path(__file__).resolve().parents[3]
EVERY = [*ATTACKS, *PLANT_AND_LOOK]
LEVELS = ("A", "B")


@functools.cache
def outcomes_at(level: str) -> dict[str, Any]:
    try:
        with Sandbox(level=level, minimum_level="D") as sandbox:
            assert sandbox.level == level
    except SandboxUnavailableError as error:
        pytest.skip(f"level {level} is not to be had here: {error}")
    return run_suite(level)


@functools.cache
def outcomes_of_ordinary_user(level: str) -> dict[str, Any]:
    """The suite, run by `nobody` with an interpreter and a copy of the code that it may read."""
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    user = pwd.getpwnam("nobody")
    python = find_interpreter_for(user)
    folder = Path("/var/tmp", f"grpo-attacks-{os.getpid()}")
    try:
        for part in ("rewards", "tests/rewards/attacks"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        answer = subprocess.run(
            [python, "-m", "tests.rewards.attacks.drive", level],
            cwd=folder,
            env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    if "SandboxUnavailableError" in answer.stderr:
        pytest.skip(f"level {level} is not to be had here by an ordinary user: {answer.stderr.splitlines()[-1]}")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["user"] == user.pw_uid
    return found


def find_interpreter_for(user: pwd.struct_passwd) -> str:
    """A Python 3.11 or later that this user can start; the one of the tests may lie in root's home."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            run = subprocess.run(
                command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/", env={}, capture_output=True
            )
        except OSError:
            continue
        if run.returncode == 0:
            return python
    pytest.skip("no Python 3.11 that an ordinary user may start")


def check(found: dict[str, Any], name: str) -> None:
    attack = next(attack for attack in EVERY if attack.name == name)
    outcome = found["outcomes"][name]
    assert outcome["reward"] is not None, outcome["detail"]
    assert attack.lowest <= outcome["reward"] <= attack.highest, outcome["detail"]
    assert outcome["seconds"] <= attack.max_s


@pytest.mark.parametrize("name", [attack.name for attack in EVERY])
@pytest.mark.parametrize("level", LEVELS)
def test_attack_holds(level: str, name: str) -> None:
    check(outcomes_at(level), name)


@pytest.mark.parametrize("name", [attack.name for attack in EVERY])
@pytest.mark.parametrize("level", LEVELS)
def test_attack_holds_as_an_ordinary_user(level: str, name: str) -> None:
    check(outcomes_of_ordinary_user(level), name)


@pytest.mark.parametrize("level", LEVELS)
def test_attacks_leave_nothing_behind(level: str) -> None:
    found = outcomes_at(level)
    assert (found["traces"], found["processes"]) == ([], [])


@pytest.mark.parametrize("level", LEVELS)
def test_attacks_of_an_ordinary_user_leave_nothing_behind(level: str) -> None:
    found = outcomes_of_ordinary_user(level)
    assert (found["traces"], found["processes"]) == ([], [])


def test_the_suite_is_what_it_says() -> None:
    names = [attack.name for attack in EVERY]
    assert len(names) == len(set(names))
    assert len(names) >= 80
