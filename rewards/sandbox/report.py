"""What this machine offers to keep programs in, why not more, and a self-test of the level in force."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from rewards.sandbox.landlock import describe_abi, landlock_abi
from rewards.sandbox.limits import Limits
from rewards.sandbox.programs import run_with_input
from rewards.sandbox.sandbox import LEVELS, Level, Sandbox, SandboxUnavailableError

_MADE_OF = {
    "A": "namespaces, Landlock, seccomp, resource limits",
    "B": "Landlock, seccomp, resource limits",
    "C": "seccomp, resource limits: programs can read the user's files",
    "D": "resource limits only: programs can do what the user can",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelReport:
    """One level on this machine."""

    level: Level
    """A is the strongest."""
    is_available: bool
    """A trial run went through with all its walls up."""
    reason: str
    """What it is made of; or what this machine refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that the self-test tried."""

    name: str
    """What a program tried to do, or has to be able to do."""
    has_passed: bool
    """The jail did as it should."""
    detail: str
    """What the program said."""


def report_levels() -> list[LevelReport]:
    """Try every level, the strongest first."""
    reports = []
    for level, features in LEVELS.items():
        try:
            with Sandbox(level=level, minimum_level="D", packages=(), workers=1) as sandbox:
                assert sandbox.level == level
            extra = f" ({describe_abi(landlock_abi())})" if features["landlock"] else ""
            reports.append(LevelReport(level=level, is_available=True, reason=_MADE_OF[level] + extra))
        except SandboxUnavailableError:
            reports.append(LevelReport(level=level, is_available=False, reason=sandbox.reasons[level]))
    return reports


def run_self_test(sandbox: Sandbox) -> list[Check]:
    """Run small programs that try the walls. SandboxUnavailableError if the sandbox has no level on this machine."""
    limits = Limits(wall_s=5, memory_mb=128)
    checks = []
    for name, body in _ATTEMPTS.items():
        program = f"import os, socket\ntry:\n    {body}\nexcept Exception as error:\n    print('held:', error)\n"
        program += "else:\n    print('open')\n"
        run = run_with_input(sandbox, {"mode": "stdio", "program": program}, b"", limits)
        said = run.stdout.decode("utf-8", "replace").strip() or run.stderr.strip()[-200:]
        checks.append(Check(name=name, has_passed=said.startswith("held:"), detail=said))
    run = run_with_input(sandbox, {"mode": "stdio", "program": _HONEST}, b"20 22", limits)
    said = run.stdout.decode("utf-8", "replace").strip() or run.stderr.strip()[-200:]
    checks.append(Check(name="run an honest program", has_passed=said == "42", detail=said))
    return checks


def describe_machine() -> str:
    """One line: what kernel, what machine, which user."""
    return f"{platform.system()} {platform.release()}, {platform.machine()}, user id {os.geteuid()}"


_ATTEMPTS = {
    "read a file of the user's": f"open({__file__!r}).read()",
    "list the root folder": "os.listdir('/')",
    "make a folder beside the temporary ones": "os.rmdir(os.mkdir('/tmp/grpo-self-test') or '/tmp/grpo-self-test')",
    "read the trainer's environment": f"open('/proc/{os.getppid()}/environ', 'rb').read()",
    "open a socket": "socket.socket()",
    "start a process": "os.fork()",
    "run a command": "os.execv('/bin/sh', ['sh', '-c', 'echo open'])",
    "signal another process": "os.kill(os.getpid() + 1, 0)",
    "take more memory than allowed": "bytearray(256 << 20)",
    "write more than allowed": "open('f', 'wb').write(bytes(64 << 20))",
}
_HONEST = """
import threading
thread = threading.Thread(target=lambda: print(sum(map(int, input().split()))))
thread.start()
thread.join()
"""
