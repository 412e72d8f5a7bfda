"""What a problem of `score_program` has to be; a malformed one is its author's mistake, never a program's failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.sandbox import wire

STYLES = ("stdio", "function", "assert")


def check_problem(problem: Mapping[str, Any]) -> None:
    """ValueError that names the key if a problem is not as `score_program` describes it."""
    if not isinstance(problem, Mapping):
        raise ValueError(f"problem: must be a mapping, got {type(problem).__name__}")
    style = problem.get("style")
    if style not in STYLES:
        raise ValueError(f"problem: style must be one of {', '.join(STYLES)}, got {style!r}")
    if style == "assert":
        _check_tests(problem)
        return
    _check_text(problem.get("prelude", ""), "prelude")
    if style == "function" and not (isinstance(problem.get("entry_point"), str) and problem["entry_point"]):
        raise ValueError(
            f"problem: a function problem needs entry_point, a function's name; got {problem.get('entry_point')!r}"
        )
    cases = problem.get("cases")
    if not isinstance(cases, Sequence) or isinstance(cases, str | bytes) or not cases:
        raise ValueError(f"problem: a {style} problem needs cases, a list that is not empty")
    needed, check = ("stdout", _check_stdio_case) if style == "stdio" else ("expected", _check_function_case)
    for number, case in enumerate(cases):
        if not isinstance(case, Mapping) or needed not in case:
            raise ValueError(f"problem: case {number} of a {style} problem lacks {needed}")
        check(case, f"case {number}: ")


def _check_tests(problem: Mapping[str, Any]) -> None:
    if not isinstance(problem.get("tests"), str) or not problem["tests"].strip():
        raise ValueError("problem: an assert problem needs tests, source code with assertions")
    entry_point = problem.get("entry_point")
    if entry_point is not None and not isinstance(entry_point, str):
        raise ValueError(f"problem: entry_point must be a function's name, got {entry_point!r}")


def _check_stdio_case(case: Mapping[str, Any], where: str) -> None:
    _check_text(case.get("stdin", ""), f"{where}stdin")
    _check_text(case["stdout"], f"{where}stdout")


def _check_function_case(case: Mapping[str, Any], where: str) -> None:
    if not isinstance(case.get("args", ()), list | tuple):
        raise ValueError(f"problem: {where}args must be a list, got {case['args']!r}")
    keywords = case.get("kwargs") or {}
    if not isinstance(keywords, Mapping) or not all(isinstance(name, str) for name in keywords):
        raise ValueError(f"problem: {where}kwargs must map names to values, got {keywords!r}")
    if "expected_any" in case and not (isinstance(case["expected_any"], list | tuple) and case["expected_any"]):
        raise ValueError(f"problem: {where}expected_any must be a list that is not empty, got {case['expected_any']!r}")
    for key in ("args", "kwargs", "expected", "expected_any"):
        try:
            wire.encode(case.get(key))
        except wire.WireError as error:
            raise ValueError(f"problem: {where}{key} holds {error}") from error


def _check_text(value: Any, key: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"problem: {key} must be text, got {type(value).__name__}")
    try:
        value.encode("utf-8", "surrogateescape")  # undecodable bytes of a file, read so, go in as they were
    except UnicodeEncodeError as error:
        raise ValueError(f"problem: {key} cannot be written as UTF-8: {error}") from error
