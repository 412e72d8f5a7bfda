"""Programs run by a SandboxFusion service, for those who keep one for a cluster; the verdict is still made here.

The service runs what it is sent and answers what was printed (`POST /run_code`). Problems of style `assert` are
refused, since their tests would share a process with the program there, which can then forge what comes of them.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.code_compare import outputs_match, values_match
from rewards.sandbox import wire
from rewards.sandbox.limits import Limits, merge_limits
from rewards.types import RewardResult, Status

_MIB = 1 << 20
_DRIVER = """
import json, sys
import wire
calls = json.load(open("calls.json"))
answers = []
namespace = {"__name__": "__main__"}
try:
    exec(compile(open("program.py").read(), "program.py", "exec"), namespace)
    owner = namespace if calls["entry_point"] in namespace else None
    function = namespace[calls["entry_point"]] if owner else getattr(namespace["Solution"](), calls["entry_point"])
except BaseException as error:
    calls["cases"] = []
for case in calls["cases"]:
    try:
        value = function(*wire.decode(case["args"]), **wire.decode(case["kwargs"]))
        answers.append({"v": wire.encode(value)})
    except BaseException as error:
        answers.append({"e": type(error).__name__})
sys.__stdout__.write("\\n" + calls["mark"] + json.dumps(answers) + "\\n")
sys.__stdout__.flush()
"""
"""Runs in the service, beside `wire.py`; it sends values, which are compared here."""


class RemoteError(RuntimeError):
    """The service did not answer, or not as SandboxFusion does."""


class SandboxFusion:
    """A client of one service."""

    def __init__(self, url: str, *, timeout_s: float = 60.0, retries: int = 2) -> None:
        """`url`: of the service, without path. `timeout_s`: for one request, above the run's own limit."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"sandbox.url must start with http:// or https://, got {url!r}")
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries

    def score_program(
        self, program: str, problem: Mapping[str, Any], *, limits: Mapping[str, Any] | Limits | None = None
    ) -> RewardResult:
        """As `rewards.score_program`, run by the service. No reward and status `error` where the service failed.

        ValueError for a problem of style `assert`.
        """
        started = time.monotonic()
        merged = merge_limits(problem.get("limits"), limits)
        judges = {"stdio": self._judge_stdio, "function": self._judge_function}
        if problem.get("style") not in judges:
            raise ValueError(
                f"problem: style must be stdio or function for a remote sandbox, got {problem.get('style')!r}"
            )
        try:
            passed, is_timeout = judges[problem["style"]](program, problem, merged)
        except RemoteError as error:
            elapsed = time.monotonic() - started
            return RewardResult(reward=None, status="error", detail=f"not judged: {error}", elapsed_s=elapsed)
        total = len(problem["cases"])
        status: Status = "timeout" if is_timeout else "ok"
        return RewardResult(
            reward=passed / total,
            status=status,
            detail=f"{passed} of {total} tests passed",
            elapsed_s=time.monotonic() - started,
        )

    def _judge_stdio(self, program: str, problem: Mapping[str, Any], limits: Limits) -> tuple[int, bool]:
        passed, is_timeout = 0, False
        language = {"javascript": "nodejs"}.get(problem.get("language", "python"), problem.get("language", "python"))
        for case in problem["cases"]:
            run = self._run(program, language, case.get("stdin", ""), {}, limits)
            is_timeout |= run["status"] == "TimeLimitExceeded"
            if run["status"] == "Finished" and run.get("return_code") == 0:
                passed += outputs_match(str(run.get("stdout", "")).encode("utf-8", "surrogateescape"), case["stdout"])
        return passed, is_timeout

    def _judge_function(self, program: str, problem: Mapping[str, Any], limits: Limits) -> tuple[int, bool]:
        mark = f"--{secrets.token_hex(16)}--"
        cases = [
            {"args": wire.encode(list(case.get("args", ()))), "kwargs": wire.encode(dict(case.get("kwargs") or {}))}
            for case in problem["cases"]
        ]
        calls = {"entry_point": problem["entry_point"], "cases": cases, "mark": mark}
        files = {
            "wire.py": Path(wire.__file__).read_text(),
            "program.py": program,
            "calls.json": json.dumps(calls),
        }
        run = self._run(_DRIVER, "python", "", files, limits)
        line = str(run.get("stdout", "")).rpartition(mark)[2].partition("\n")[0]
        try:
            answers = wire.loads(line.encode()[: 4 * _MIB]) if mark in str(run.get("stdout", "")) else []
        except wire.WireError:
            answers = []
        answers = answers if type(answers) is list else []
        passed = sum(
            type(answer) is dict and "v" in answer and values_match(answer["v"], case["expected"])
            for answer, case in zip(answers, problem["cases"], strict=False)
        )
        return passed, run["status"] == "TimeLimitExceeded"

    def _run(self, code: str, language: str, stdin: str, files: Mapping[str, str], limits: Limits) -> dict[str, Any]:
        """One run's `run_result`; one that never started has the status `Error`. RemoteError if the service failed."""
        request = {
            "code": code,
            "language": language,
            "stdin": stdin,
            "run_timeout": limits.wall_s,
            "memory_limit_MB": int(limits.memory_mb),
            "files": {
                name: base64.b64encode(text.encode("utf-8", "surrogateescape")).decode() for name, text in files.items()
            },
        }
        answer = self._post(json.dumps(request).encode(), limits.wall_s + self._timeout_s)
        if answer.get("status") == "SandboxError":
            raise RemoteError(f"{self._url} says: {answer.get('message')}")
        run = answer.get("run_result") or {"status": "Error"}
        if not isinstance(run, dict) or not isinstance(run.get("status"), str):
            raise RemoteError(f"{self._url} answered something that is no run_result")
        return run

    def _post(self, body: bytes, timeout_s: float) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/run_code", data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        problem = ""
        for attempt in range(self._retries + 1):
            time.sleep(attempt)
            try:
                with urllib.request.urlopen(request, timeout=timeout_s) as response:
                    answer = json.load(response)
            except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
                problem = str(error)
                continue
            if isinstance(answer, dict):
                return answer
            problem = "an answer that is no JSON object"
        raise RemoteError(f"{self._url} failed {self._retries + 1} times: {problem}")
