"""Code rewards: a program is run in the jail, and what it answers is judged here, where the expected answers stay.

`score_program` is the door; the registry's `code` takes the program out of a completion first.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards.code_compare import outputs_match, values_match
from rewards.code_problem import check_problem
from rewards.sandbox import wire
from rewards.sandbox.languages import Compiled, compile_program, find_language
from rewards.sandbox.limits import Limits, merge_limits
from rewards.sandbox.programs import CallOutcome, call_function, run_tests, run_with_input
from rewards.sandbox.sandbox import Level, Sandbox, SandboxError, SandboxUnavailableError
from rewards.types import Problem, RewardResult, Status

Scoring = Literal["binary", "fractional"]

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n`]*$", re.MULTILINE)
_PYTHON_TAGS = ("python", "py", "python3")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What came of one problem."""

    passed: int
    """Tests passed."""
    total: int
    """Tests in all, at least 1."""
    detail: str = ""
    """Why the first test that failed did."""
    is_timeout: bool = False
    """A time limit was reached."""


def score_program(
    program: str,
    problem: Mapping[str, Any],
    *,
    limits: Mapping[str, Any] | Limits | None = None,
    sandbox: Sandbox | None = None,
    stop_at_failure: bool = False,
) -> RewardResult:
    """The share of the problem's tests that the program passes, run in the jail.

    `problem` is one of these, each with `limits` (fields of `Limits`, which the argument overrides) if it likes:

        {"style": "stdio", "cases": [{"stdin", "stdout"}], "language": "python"}
        {"style": "function", "entry_point", "cases": [{"args", "kwargs", "expected"}]}
        {"style": "assert", "entry_point", "tests": "source with asserts"}

    A function's case may have `expected_any`, a list of values of which each will do. `prelude`, with stdio and
    function, is source to run before the program: imports its author could rely on. May be called from many threads.

    The program is never the cause of an exception. A run that could not be judged for reasons of the machine's has the
    status `error` and no reward. ValueError for a malformed problem; SandboxUnavailableError if the machine does not
    offer the minimum level of isolation. `stop_at_failure`: tests after the first failed one count as failed, unrun.
    """
    started = time.monotonic()
    check_problem(problem)
    merged = merge_limits(problem.get("limits"), limits)
    if not isinstance(program, str) or not program.strip():
        return RewardResult(reward=0.0, status="unparsed", detail="no program")
    sandbox = sandbox or default_sandbox()
    try:
        judge = {"stdio": _judge_stdio, "function": _judge_function, "assert": _judge_tests}[problem["style"]]
        verdict = judge(sandbox, program, problem, merged, stop_at_failure)
    except SandboxUnavailableError:
        raise
    except SandboxError as error:
        elapsed = time.monotonic() - started
        return RewardResult(reward=None, status="error", detail=f"not judged: {error}", elapsed_s=elapsed)
    status: Status = "timeout" if verdict.is_timeout else "ok"
    detail = f"{verdict.passed} of {verdict.total} tests passed"
    return RewardResult(
        reward=verdict.passed / verdict.total,
        status=status,
        detail=_printable(f"{detail}; {verdict.detail}" if verdict.detail else detail),
        elapsed_s=time.monotonic() - started,
    )


def make_code_reward(
    *, scoring: Scoring = "binary", minimum_level: Level = "B"
) -> Callable[[Problem, str], RewardResult]:
    """A reward like `code`, of another scoring or in a sandbox of another `sandbox.minimum_level`."""

    def code(problem: Problem, completion: str) -> RewardResult:
        return score_completion(completion, problem, scoring=scoring, sandbox=default_sandbox(minimum_level))

    return code


def code_reward(problem: Problem, completion: str) -> RewardResult:
    """The registry's `code`: 1.0 if the completion's last fenced block passes all of `problem.tests`, else 0.0."""
    return score_completion(completion, problem)


def code_fraction_reward(problem: Problem, completion: str) -> RewardResult:
    """The registry's `code_fraction`: the share of `problem.tests` that the completion's last fenced block passes."""
    return score_completion(completion, problem, scoring="fractional")


def score_completion(
    completion: str, problem: Problem, *, scoring: Scoring = "binary", sandbox: Sandbox | None = None
) -> RewardResult:
    """Score the program in a completion. ValueError if the problem has no tests or `scoring` is neither of the two."""
    if scoring not in ("binary", "fractional"):
        raise ValueError(f"scoring must be 'binary' or 'fractional', got {scoring!r}")
    if problem.tests is None:
        raise ValueError(f"problem {problem.id} ({problem.source}) has no tests, which the code reward needs")
    program = extract_program(completion, problem.tests.get("language", "python"))
    if program is None:
        return RewardResult(reward=0.0, status="unparsed", detail="no closed code block in the completion")
    is_binary = scoring == "binary"
    result = score_program(program, problem.tests, sandbox=sandbox, stop_at_failure=is_binary)
    if not is_binary or result.reward is None:
        return result
    return RewardResult(
        reward=float(result.reward == 1.0), status=result.status, detail=result.detail, elapsed_s=result.elapsed_s
    )


def extract_program(completion: str, language: str = "python") -> str | None:
    """The last closed fenced block in `language`, else the last closed one of any; None if there is none.

    A block left open is not a program: the completion was cut off in it.
    """
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(completion):
        if opening is None:
            opening = fence
        elif not fence[2] and fence[1].startswith(opening[1]):
            blocks.append((opening[2].lower(), completion[opening.end() + 1 : fence.start()]))
            opening = None
    tags = _PYTHON_TAGS if language == "python" else find_language(language).tags
    own = [body for tag, body in blocks if tag in tags]
    every = own or [body for _, body in blocks]
    return every[-1] if every else None


@functools.cache
def default_sandbox(minimum_level: Level = "B") -> Sandbox:
    """The process's own sandbox, made at its first use."""
    return Sandbox(minimum_level=minimum_level)


def _judge_stdio(
    sandbox: Sandbox, program: str, problem: Mapping[str, Any], limits: Limits, stop_at_failure: bool
) -> _Verdict:
    language = problem.get("language", "python")
    payload: Mapping[str, Any] = {"mode": "stdio", "program": program, "prelude": problem.get("prelude", "")}
    compiled: Compiled | None = None
    if language != "python":
        sandbox = sandbox.with_toolchain(find_language(language).toolchain)
        compiled = compile_program(sandbox, language, program, limits)
        if compiled.error is not None:
            return _Verdict(passed=0, total=len(problem["cases"]), detail=compiled.error)
        payload = compiled.payload
    try:
        return _run_cases(sandbox, payload, problem["cases"], limits, stop_at_failure, compiled)
    finally:
        if compiled is not None:
            compiled.close()


def _run_cases(
    sandbox: Sandbox,
    payload: Mapping[str, Any],
    cases: Sequence[Mapping[str, str]],
    limits: Limits,
    stop_at_failure: bool,
    compiled: Compiled | None,
) -> _Verdict:
    passed, cut_off_s, is_timeout, detail = 0, 0.0, False, ""
    extra = () if compiled is None else compiled.descriptors
    for number, case in enumerate(cases):
        if not limits.has_patience(cut_off_s):
            break
        run = run_with_input(
            sandbox, payload, case.get("stdin", "").encode("utf-8", "surrogateescape"), limits, extra=extra
        )
        failure = ""
        if run.outcome.killed == "wall":
            cut_off_s += run.outcome.wall_s
            is_timeout, failure = True, f"no end within {limits.wall_s:g} s"
        elif run.outcome.killed:
            failure = f"killed for its use of {run.outcome.killed}"
        elif run.outcome.exit_code != 0:
            last = run.stderr.strip().splitlines()[-1:] or [""]
            failure = f"exit status {run.outcome.exit_code} {last[0][:200]}".rstrip()
        elif run.is_cut:
            failure = f"more than {limits.output_mb:g} MiB of output"
        elif not outputs_match(run.stdout, case["stdout"]):
            failure = f"printed {_shorten(run.stdout)}, expected {_shorten(case['stdout'].encode('utf-8', 'replace'))}"
        if not failure:
            passed += 1
            continue
        detail = detail or f"case {number}: {failure}"
        if stop_at_failure:
            break
    return _Verdict(passed=passed, total=len(cases), detail=detail, is_timeout=is_timeout)


def _judge_function(
    sandbox: Sandbox, program: str, problem: Mapping[str, Any], limits: Limits, stop_at_failure: bool
) -> _Verdict:
    cases = problem["cases"]
    answers = call_function(sandbox, program, problem["entry_point"], cases, limits, prelude=problem.get("prelude", ""))
    failures = [
        (number, _explain(answer, case["expected"]))
        for number, (answer, case) in enumerate(zip(answers, cases, strict=True))
        if answer.error is not None
        or not any(values_match(answer.value, value) for value in case.get("expected_any", [case["expected"]]))
    ]
    detail = f"case {failures[0][0]}: {failures[0][1]}" if failures else ""
    return _Verdict(
        passed=len(cases) - len(failures),
        total=len(cases),
        detail=detail,
        is_timeout=any(answer.is_timeout for answer in answers),
    )


def _judge_tests(
    sandbox: Sandbox, program: str, problem: Mapping[str, Any], limits: Limits, stop_at_failure: bool
) -> _Verdict:
    tests = run_tests(sandbox, program, problem.get("entry_point") or "", problem["tests"], limits)
    return _Verdict(passed=tests.passed, total=tests.total, detail=tests.detail, is_timeout=tests.is_timeout)


def _explain(answer: CallOutcome, expected: Any) -> str:
    if answer.error is not None:
        return answer.error
    return f"returned {_shorten(wire.dumps(answer.value))}, expected {_shorten(wire.dumps(wire.encode(expected)))}"


def _printable(text: str) -> str:
    """One line without control characters, which a program could send to the terminal that shows a log."""
    return "".join(character if character.isprintable() else " " for character in text)


def _shorten(text: bytes) -> str:
    return repr(text[:80].decode("utf-8", "replace")) + ("..." if len(text) > 80 else "")
