"""When an answer counts as the expected one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.code_compare import outputs_match, values_match
from rewards.sandbox import wire

NAN = float("nan")
INFINITY = float("inf")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("7", "7\n"),
        ("7\n\n\n", "7"),
        ("7  \n8\t\n", "7\n8"),
        ("a b\r\n", "a b"),
        ("", "\n"),
        ("0.3333333", "0.33333333333"),
        ("x 1.0000004 y", "x 1.0 y"),
        ("3", "3.0"),
        ("1e0", "1.0"),
        ("-0.0", "0.0"),
        ("12345678901.5", "12345678901.499999"),
        ("a 1.50 b\n", "a 1.5 b"),
    ],
)
def test_outputs_that_match(actual: str, expected: str) -> None:
    assert outputs_match(actual.encode(), expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("8", "7"),
        (" 7", "7"),
        ("7 8", "7  8"),
        ("7\n\n8", "7\n8"),
        ("7.0", "7"),
        ("7.0000001", "7"),
        ("1.00001", "1.0"),
        ("nan", "1.0"),
        ("inf", "1.0"),
        ("1e999", "1.0"),
        ("1_0.0", "10.0"),
        ("0x1.0", "1.0"),
        ("1.0 2.0", "1.0"),
        ("", "7"),
        ("7\n", ""),
        ("١.٠", "1.0"),
        ("1.0.0", "1.0"),
        ("\ufffd", "\ufffe"),
    ],
)
def test_outputs_that_do_not(actual: str, expected: str) -> None:
    assert not outputs_match(actual.encode(), expected)


def test_bytes_that_are_no_text_match_nothing() -> None:
    assert not outputs_match(b"\xff", "\ufffd")


def test_long_tokens_are_compared_at_once() -> None:
    digits = "1" * 2_000_000
    assert not outputs_match(f"{digits}.0".encode(), f"{digits}.5")
    assert outputs_match(f"{digits}.0".encode(), f"{digits}.0")


def match(actual: Any, expected: Any) -> bool:
    return values_match(wire.loads(wire.dumps(wire.encode(actual))), expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ((1, 2), [1, 2]),
        ([1, (2, "x")], [1, [2, "x"]]),
        (0.1 + 0.2, 0.3),
        (2, 2.0),
        (2.0, 2),
        (NAN, NAN),
        (INFINITY, INFINITY),
        ({1: "a", None: 2}, {"1": "a", "null": 2}),
        ({True: 3}, {"true": 3}),
        ({"a": (1.0000001,)}, {"a": [1.0]}),
        ({1, 2}, {2, 1}),
        (None, None),
        (b"x", b"x"),
        ({(1, 2): 3}, {(1, 2): 3}),
    ],
)
def test_values_that_match(actual: Any, expected: Any) -> None:
    assert match(actual, expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (True, 1),
        (1, True),
        (0, False),
        (False, None),
        (0, None),
        ("", None),
        ("7", 7),
        (7, "7"),
        (1.00001, 1.0),
        (NAN, 1.0),
        (INFINITY, 1),
        (1e18, 10**18 + 1),
        ([1, 2], [1, 2, 3]),
        ([1, 2, 3], [1, 2]),
        ([[1]], [1]),
        ({1, 2}, [1, 2]),
        ([1, 2], {1, 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({1: 1, "1": 1}, {"1": 1}),
        ("abc", ["a", "b", "c"]),
        (iter([1, 2]), [1, 2]),
        (range(2), [0, 1]),
    ],
)
def test_values_that_do_not(actual: Any, expected: Any) -> None:
    assert not match(actual, expected)


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"d": 5},
        {"d": [5]},
        {"d": [[1, 2, 3]]},
        {"t": 5},
        {"f": 5},
        {"f": "x"},
        {"i": "x"},
        {"s": 5},
        {"v": 7},
        [[]] * 3,
    ],
)
@pytest.mark.parametrize("expected", [7, 1.5, [1], {"a": 1}, {1}, None, "x", True])
def test_forged_data_matches_nothing_and_raises_nothing(forged: Any, expected: Any) -> None:
    assert not values_match(forged, expected)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_every_json_value_matches_itself(value: Any) -> None:
    assert match(value, value)


def test_large_ints_match_exactly() -> None:
    assert match(10**5000, 10**5000)
    assert not match(10**5000 + 1, 10**5000)
    assert not match(10**400, 1.0)
    assert not match(1.0, 10**400)


@given(st.integers(), st.integers())
def test_ints_match_exactly(a: int, b: int) -> None:
    assert match(a, b) == (a == b)
