"""The three ways to run a program: with input, with calls, with tests. What comes back is data, to be judged here."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rewards.sandbox import wire
from rewards.sandbox.files import open_anonymous_file, read_file, read_tail
from rewards.sandbox.limits import Limits
from rewards.sandbox.sandbox import Outcome, Role, Sandbox, SandboxError, SandboxUnavailableError

MIB = 1 << 20
Answer = TypeVar("Answer")
MAX_ANSWER_BYTES = 4 * MIB
"""Most bytes of answers read back from the calls of one run: Python objects take some twenty times their text."""
_TAIL_BYTES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class StdioOutcome:
    """One run with input."""

    stdout: bytes
    """What it printed, up to the limit."""
    is_cut: bool
    """It printed more than the limit."""
    stderr: str
    """The last lines of its standard error."""
    outcome: Outcome
    """How it ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallOutcome:
    """One call of the entry point."""

    value: Any = None
    """What it returned, as it came over the wire; only meaningful without an error."""
    error: str | None = None
    """What it raised, or how the process ended instead."""
    is_timeout: bool = False
    """The time was over first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestsOutcome:
    """One run of a test suite."""

    passed: int
    """Assertions that held."""
    total: int
    """Assertions there are, as far as is known."""
    is_complete: bool
    """The tests ran to their end, at least one assertion was made, and all held."""
    detail: str
    """The first assertion that did not hold, or how it ended."""
    is_timeout: bool
    """The time was over first."""


def run_with_input(
    sandbox: Sandbox, payload: Mapping[str, Any], stdin: bytes, limits: Limits, *, extra: Sequence[int] = ()
) -> StdioOutcome:
    """Run a program (`{"mode": "stdio", "program": ...}` or an `exec` payload) with `stdin`.

    `extra` descriptors become its numbers 4 and up. SandboxError if the sandbox fails, twice.
    """
    return _twice(lambda: _run_with_input(sandbox, payload, stdin, limits, extra))


def _run_with_input(
    sandbox: Sandbox, payload: Mapping[str, Any], stdin: bytes, limits: Limits, extra: Sequence[int]
) -> StdioOutcome:
    is_native = payload["mode"] == "exec"
    with _files(_payload(payload), stdin, b"", b"") as (program, standard_in, out, err):
        role = Role(
            descriptors=(standard_in, out, err, program, *extra),
            limits=kernel_limits(limits, reserves_address_space=is_native),
            profile="exec" if is_native else "threads",
        )
        outcome = sandbox.run([role], limits.wall_s)
        cap = math.ceil(limits.output_mb * MIB)
        return StdioOutcome(
            stdout=read_file(out, cap),
            is_cut=os.fstat(out).st_size >= cap,
            stderr=read_tail(err, _TAIL_BYTES).decode("utf-8", "replace"),
            outcome=outcome,
        )


def call_function(
    sandbox: Sandbox,
    program: str,
    entry_point: str,
    calls: Sequence[Mapping[str, Any]],
    limits: Limits,
    *,
    prelude: str = "",
) -> list[CallOutcome]:
    """Call the entry point once per `{"args", "kwargs"}`, all in one process as long as that goes well.

    `prelude` is source that runs before the program, in its namespace.

    Each call has `limits.wall_s`: one that is cut off after others had used the time is tried again, first in a process
    of its own. A call that ends its process fails, and those after it get a new process. SandboxError if the sandbox
    fails, twice.
    """
    answers: list[CallOutcome] = []
    base = {"mode": "function", "program": program, "entry_point": entry_point, "prelude": prelude}
    cut_off_s = 0.0
    while len(answers) < len(calls):
        if not limits.has_patience(cut_off_s):
            over = CallOutcome(error="not run, after too many timeouts", is_timeout=True)
            return answers + [over] * (len(calls) - len(answers))
        lines, outcome, stderr = _call_rest(sandbox, base, calls[len(answers) :], limits)
        if not lines or lines[0] != {"loaded": True}:
            error = str(lines[0].get("e")) if lines and type(lines[0]) is dict else _describe_end(outcome, stderr)
            failed = CallOutcome(error=error[:300], is_timeout=outcome.killed == "wall")
            return answers + [failed] * (len(calls) - len(answers))
        new = [_read_answer(line) for line in lines[1 : 1 + len(calls) - len(answers)]]
        answers += new
        was_cut_short = outcome.killed == "wall" and new
        if len(answers) < len(calls) and not was_cut_short:
            cut_off_s += outcome.wall_s if outcome.killed == "wall" else 0
            answers.append(CallOutcome(error=_describe_end(outcome, stderr), is_timeout=outcome.killed == "wall"))
    return answers


def run_tests(sandbox: Sandbox, program: str, entry_point: str, tests: str, limits: Limits) -> TestsOutcome:
    """Run `tests` in a process that calls the program in another.

    SandboxError if the sandbox fails, twice; ValueError if the tests are no Python source.
    """
    return _twice(lambda: _run_tests(sandbox, program, entry_point, tests, limits))


def _run_tests(sandbox: Sandbox, program: str, entry_point: str, tests: str, limits: Limits) -> TestsOutcome:
    serve = _payload({"mode": "serve", "program": program})
    check = _payload({"mode": "tests", "tests": tests, "entry_point": entry_point})
    with (
        _files(serve, check, b"", b"", b"") as (serve_payload, check_payload, err, check_err, results),
        _null() as null,
    ):
        kernel = kernel_limits(limits)
        program_role = Role(descriptors=(null, null, err, serve_payload, "0r", "1w"), limits=kernel)
        tests_role = Role(descriptors=(null, null, check_err, check_payload, results, "0w", "1r"), limits=kernel)
        outcome = sandbox.run([program_role, tests_role], limits.wall_s)
        record = read_file(results, MAX_ANSWER_BYTES).decode("utf-8", "replace").splitlines()
    if record and record[0].startswith("!"):
        raise ValueError(f"problem: tests cannot be compiled: {record[0][1:]}")
    return _judge_record(record, outcome)


def kernel_limits(limits: Limits, *, reserves_address_space: bool = False) -> dict[str, int]:
    """`limits` in the kernel's units: fields of `jail.RunLimits`."""
    # Rounded up: to the kernel, and in `jail.RunLimits`, 0 is no limit.
    memory = math.ceil(limits.memory_mb * MIB)
    return {
        "address_space": 0 if reserves_address_space else memory,
        "data": memory if reserves_address_space else 0,
        "cpu_s": int(limits.wall_s * 2) + 2,
        "file_bytes": math.ceil(limits.output_mb * MIB),
        "disk_bytes": math.ceil(limits.disk_mb * MIB),
        "max_threads": limits.threads,
    }


def _twice(action: Callable[[], Answer]) -> Answer:
    """Do it again if the sandbox failed: its supervisor may have been killed, by the system short of memory for one."""
    try:
        return action()
    except SandboxUnavailableError:
        raise
    except SandboxError:
        return action()


def _call_rest(
    sandbox: Sandbox, base: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], limits: Limits
) -> tuple[list[Any], Outcome, str]:
    cases = [
        {"args": wire.encode(list(c.get("args", ()))), "kwargs": wire.encode(dict(c.get("kwargs") or {}))}
        for c in calls
    ]
    payload = _payload({**base, "cases": cases})
    return _twice(lambda: _call_once(sandbox, payload, limits))


def _call_once(sandbox: Sandbox, payload: bytes, limits: Limits) -> tuple[list[Any], Outcome, str]:
    with _files(payload, b"", b"") as (program_file, err, results), _null() as null:
        role = Role(descriptors=(null, null, err, program_file, results), limits=kernel_limits(limits))
        outcome = sandbox.run([role], limits.wall_s)
        text = read_file(results, MAX_ANSWER_BYTES + 1)
        stderr = read_tail(err, _TAIL_BYTES).decode("utf-8", "replace")
    # What stands after the last newline was cut off, by the end of the process or by the cap.
    lines = text.split(b"\n")[:-1]
    if len(text) > MAX_ANSWER_BYTES:
        stderr = f"answers of more than {MAX_ANSWER_BYTES} bytes"
    parsed = []
    for line in lines:
        try:
            parsed.append(wire.loads(line))
        except wire.WireError as error:
            parsed.append({"e": str(error)})
    return parsed, outcome, stderr


def _read_answer(line: Any) -> CallOutcome:
    if type(line) is dict and "v" in line:
        return CallOutcome(value=line["v"])
    return CallOutcome(error=str(line.get("e"))[:300] if type(line) is dict else "not an answer")


def _judge_record(record: Sequence[str], outcome: Outcome) -> TestsOutcome:
    passed = sum(int(line) for line in record if line.startswith("+"))
    failures = [line[1:] for line in record if line.startswith("-")]
    static = int(record[0][1:]) if record and record[0].startswith("=") else 0
    has_ended = bool(record) and record[-1] == "."
    is_complete = has_ended and not failures and passed > 0 and outcome.killed is None and outcome.exit_code == 0
    total = max(static, passed + len(failures) + (0 if is_complete else 1 if not failures else 0), 1)
    if is_complete:
        total = passed
    detail = "" if is_complete else failures[0] if failures else _describe_end(outcome, "")
    if has_ended and not failures and passed == 0:
        detail = "the tests made no assertion"
    return TestsOutcome(
        passed=passed, total=total, is_complete=is_complete, detail=detail, is_timeout=outcome.killed == "wall"
    )


def _describe_end(outcome: Outcome, stderr: str) -> str:
    if outcome.killed == "wall":
        return f"no answer within {outcome.wall_s:.1f} s"
    if outcome.killed:
        return f"killed: too much {outcome.killed}" if outcome.killed == "disk" else "killed: too many threads"
    last = stderr.strip().splitlines()[-1:] or [""]
    return f"the process ended with status {outcome.exit_code} {last[0][:200]}".rstrip()


def _payload(payload: Mapping[str, Any]) -> bytes:
    return json.dumps(payload).encode()


@contextlib.contextmanager
def _files(*contents: bytes) -> Iterator[list[int]]:
    opened: list[int] = []
    try:
        try:
            opened.extend(open_anonymous_file(content) for content in contents)
        except OSError as error:
            raise SandboxError(f"no file for a run's input or output can be made: {error}") from error
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


@contextlib.contextmanager
def _null() -> Iterator[int]:
    try:
        descriptor = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(f"{os.devnull} cannot be opened: {error}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
