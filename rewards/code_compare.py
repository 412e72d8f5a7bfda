"""When an answer counts as the expected one: printed text, and plain values. Runs in the trainer, on data only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

TOLERANCE = 1e-6
"""Absolute error that a float may have."""
RELATIVE_TOLERANCE = 1e-9
"""And for large ones what rounding in the last printed digits makes of it; matters from 1000 on."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
_MAX_DEPTH = 200


def outputs_match(actual: bytes, expected: str) -> bool:
    """Whether a program printed what was expected.

    Trailing whitespace of lines and trailing newlines do not count; a token with a decimal point may be off by 1e-6.
    """
    text = actual.decode("utf-8", "surrogateescape")
    if text == expected:
        return True
    actual_lines, expected_lines = _lines(text), _lines(expected)
    if len(actual_lines) != len(expected_lines):
        return False
    return all(a == e or _lines_match(a, e) for a, e in zip(actual_lines, expected_lines, strict=True))


def values_match(actual: Any, expected: Any, depth: int = 0) -> bool:
    """Whether a plain value equals the expected one.

    A tuple equals a list, floats may be off by 1e-6, a bool is no int, and a dict's keys may have become strings on
    their way through JSON. Values of other types than plain data never match.
    """
    if depth > _MAX_DEPTH:
        return False
    if isinstance(expected, bool) or isinstance(actual, bool):
        return isinstance(expected, bool) and isinstance(actual, bool) and actual == expected
    if isinstance(expected, int | float) and isinstance(actual, int | float):
        return _numbers_match(actual, expected)
    if isinstance(expected, list | tuple):
        return (
            isinstance(actual, list | tuple)
            and len(actual) == len(expected)
            and all(values_match(a, e, depth + 1) for a, e in zip(actual, expected, strict=True))
        )
    if isinstance(expected, Mapping):
        return isinstance(actual, dict) and _dicts_match(actual, expected, depth)
    if isinstance(expected, set | frozenset):
        return isinstance(actual, set | frozenset) and actual == expected
    return type(actual) is type(expected) and bool(actual == expected)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _lines_match(actual: str, expected: str) -> bool:
    if "." not in expected:
        return False
    # Split with the whitespace kept: what separates tokens has to be the same.
    actual_parts, expected_parts = re.split(r"(\s+)", actual), re.split(r"(\s+)", expected)
    if len(actual_parts) != len(expected_parts):
        return False
    return all(a == e or _tokens_match(a, e) for a, e in zip(actual_parts, expected_parts, strict=True))


def _tokens_match(actual: str, expected: str) -> bool:
    if "." not in expected or not _NUMBER.fullmatch(expected) or not _NUMBER.fullmatch(actual):
        return False
    return _floats_match(float(actual), float(expected))


def _floats_match(actual: float, expected: float) -> bool:
    if not math.isfinite(actual) or not math.isfinite(expected):
        return actual == expected or (math.isnan(actual) and math.isnan(expected))
    return abs(actual - expected) <= max(TOLERANCE, RELATIVE_TOLERANCE * abs(expected))


def _numbers_match(actual: int | float, expected: int | float) -> bool:
    if isinstance(actual, int) and isinstance(expected, int):
        return actual == expected
    if type(actual) is float and type(expected) is float:
        return _floats_match(actual, expected)
    if not math.isfinite(actual) or not math.isfinite(expected):
        return False
    # An int against a float: exactly, since a float near a large int is many ints at once.
    return abs(Fraction(actual) - Fraction(expected)) <= Fraction(TOLERANCE)


def _dicts_match(actual: dict[Any, Any], expected: Mapping[Any, Any], depth: int) -> bool:
    if len(actual) != len(expected):
        return False
    if all(isinstance(key, str) for key in expected):
        actual = {_json_key(key): value for key, value in actual.items()}
    return all(key in actual and values_match(actual[key], value, depth + 1) for key, value in expected.items())


def _json_key(key: Any) -> Any:
    """The key as JSON writes it, since the expected value went through JSON."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, float):
        return repr(key)
    return str(key) if isinstance(key, int) and abs(key) < 10**300 else key
