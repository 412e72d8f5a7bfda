"""When an answer counts as the expected one: printed text, and plain values. Runs in the trainer, on data only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from rewards.sandbox import wire

TOLERANCE = 1e-6
"""Absolute error that a float may have."""
RELATIVE_TOLERANCE = 1e-9
"""And for large ones what rounding in the last printed digits makes of it; matters from 1000 on."""

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_SPACE = re.compile(r"(\s+)")
_MAX_NUMBER = 400
"""Longest token that is read as a number."""


def outputs_match(actual: bytes, expected: str) -> bool:
    """Whether a program printed what was expected.

    Trailing whitespace of lines and trailing newlines do not count; a token with a decimal point may be off by 1e-6.
    """
    text = actual.decode("utf-8", "surrogateescape")
    if text == expected:
        return True
    text, expected = text.rstrip(), expected.rstrip()
    if text.count("\n") != expected.count("\n"):
        return False
    actual_lines, expected_lines = _lines(text), _lines(expected)
    return all(a == e or _lines_match(a, e) for a, e in zip(actual_lines, expected_lines, strict=True))


def values_match(actual: Any, expected: Any) -> bool:
    """Whether plain data, as it came over the wire (`sandbox.wire`), is the expected value.

    A tuple equals a list, floats may be off by 1e-6, a bool is no int, a dict's keys are compared as JSON writes them.
    The data is walked along the expected value and never built into objects: a hostile program must not get to choose
    what is hashed or multiplied in the trainer.
    """
    if expected is None or isinstance(expected, bool | str):
        return type(actual) is type(expected) and bool(actual == expected)
    if isinstance(expected, int | float):
        number = _read_number(actual)
        return number is not None and _numbers_match(number, expected)
    if isinstance(expected, list | tuple):
        items = actual if type(actual) is list else _body(actual, "t")
        return (
            type(items) is list
            and len(items) == len(expected)
            and all(values_match(a, e) for a, e in zip(items, expected, strict=True))
        )
    if isinstance(expected, Mapping):
        pairs = _body(actual, "d")
        return type(pairs) is list and _dicts_match(pairs, expected)
    if isinstance(expected, set | frozenset):
        items = _body(actual, "s" if isinstance(expected, set) else "z")
        return type(items) is list and {wire.dumps(i) for i in items} == {wire.dumps(wire.encode(i)) for i in expected}
    return bool(actual == wire.encode(expected))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.split("\n")]


def _lines_match(actual: str, expected: str) -> bool:
    if "." not in expected:
        return False
    # Split with the whitespace kept: what separates tokens has to be the same.
    expected_parts = _SPACE.split(expected)
    # Not all of a line of millions of tokens, where few are expected.
    actual_parts = _SPACE.split(actual, maxsplit=len(expected_parts) // 2 + 1)
    if len(actual_parts) != len(expected_parts):
        return False
    return all(a == e or _tokens_match(a, e) for a, e in zip(actual_parts, expected_parts, strict=True))


def _tokens_match(actual: str, expected: str) -> bool:
    if "." not in expected or max(len(actual), len(expected)) > _MAX_NUMBER:
        return False
    if not _NUMBER.fullmatch(expected) or not _NUMBER.fullmatch(actual):
        return False
    return _floats_match(float(actual), float(expected))


def _floats_match(actual: float, expected: float) -> bool:
    if not math.isfinite(actual) or not math.isfinite(expected):
        return actual == expected or (math.isnan(actual) and math.isnan(expected))
    return abs(actual - expected) <= max(TOLERANCE, RELATIVE_TOLERANCE * abs(expected))


def _body(data: Any, tag: str) -> Any:
    """What a tagged value holds; None if the data is not of that kind."""
    return data.get(tag) if type(data) is dict and len(data) == 1 else None


def _read_number(data: Any) -> int | float | None:
    if type(data) is int:
        return data
    try:
        if type(text := _body(data, "i")) is str:
            return int(text, 16)
        if type(text := _body(data, "f")) is str:
            return float.fromhex(text)
    except (ValueError, OverflowError):
        pass
    return None


def _numbers_match(actual: int | float, expected: int | float) -> bool:
    if isinstance(actual, int) and isinstance(expected, int):
        return actual == expected
    if type(actual) is float and type(expected) is float:
        return _floats_match(actual, expected)
    if not math.isfinite(actual if type(actual) is float else expected):
        return False
    # An int against a float: exactly, since a float near a large int is many ints at once.
    return abs(Fraction(actual) - Fraction(expected)) <= Fraction(TOLERANCE)


def _dicts_match(pairs: list[Any], expected: Mapping[Any, Any]) -> bool:
    actual = {}
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2:
            return False
        actual[_key_text(pair[0])] = pair[1]
    wanted = {_key_text(wire.encode(key)): value for key, value in expected.items()}
    return (
        len(pairs) == len(actual) == len(wanted)
        and actual.keys() == wanted.keys()
        and all(values_match(actual[key], value) for key, value in wanted.items())
    )


def _key_text(key: Any) -> str:
    """A key as JSON writes it; one that JSON does not know as the wire does."""
    if type(key) is str:
        return key
    number = _read_number(key)
    if type(number) is float:
        return repr(number)
    return wire.dumps(key).decode()
