"""Plain data survives the wire; anything else is refused on both sides."""

from __future__ import annotations

import collections
import decimal
import fractions
import math
import os
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.sandbox import wire

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
KEYS = st.integers() | st.text() | st.booleans() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner) | st.frozensets(KEYS),
    max_leaves=20,
)


def round_trip(value: Any) -> Any:
    return wire.decode(wire.loads(wire.dumps(wire.encode(value))))


def are_same(a: Any, b: Any) -> bool:
    """Equal, of the same types all the way down, nan being itself."""
    if type(a) is not type(b):
        return False
    if type(a) is float:
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if type(a) is complex:
        return are_same(a.real, b.real) and are_same(a.imag, b.imag)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(are_same, a, b))
    if type(a) is dict:
        return are_same(list(a.items()), list(b.items()))
    return bool(a == b)


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {0: v}, lambda v: collections.deque([v])])
def test_the_deepest_that_is_written_is_read_and_no_deeper(wrap: Any) -> None:
    value: Any = 1
    for _ in range(wire.MAX_DEPTH):
        value = wrap(value)
    assert round_trip(value) == value
    with pytest.raises(wire.WireError):
        wire.encode(wrap(value))


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"t":[', b"]}"), (b'{"d":[[0,', b"]]}")])
def test_text_deeper_than_is_written_is_refused(opening: bytes, closing: bytes) -> None:
    for depth in (620, 900, 5000, 100_000):
        with pytest.raises(wire.WireError):
            wire.loads(opening * depth + b"1" + closing * depth)
    assert len(wire.loads(b"[" + b"[]," * 700 + b"[]]")) == 701


@given(VALUES)
def test_plain_data_survives(value: Any) -> None:
    assert are_same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        10**20_000,
        -(2**53),
        range(3, 9, 2),
        collections.deque([1, (2,)]),
        decimal.Decimal("1.50"),
        fractions.Fraction(3, 7),
        {1, 2},
        "\ud800",
    ],
    ids=["huge", "large", "range", "deque", "decimal", "fraction", "set", "surrogate"],
)
def test_what_else_is_plain_survives(value: Any) -> None:
    assert are_same(round_trip(value), value)


def test_dict_subclasses_of_the_standard_library_travel_as_dict() -> None:
    for value in (
        collections.Counter("aab"),
        collections.OrderedDict(a=2, b=1),
        collections.defaultdict(int, a=2, b=1),
    ):
        assert are_same(round_trip(value), {"a": 2, "b": 1})


def test_iterators_are_run_to_their_end() -> None:
    assert list(round_trip(n * n for n in range(4))) == [0, 1, 4, 9]
    assert list(round_trip(map(str, [1, 2]))) == ["1", "2"]


def test_numpy_scalars_travel_as_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert are_same(round_trip([numpy.int64(3), numpy.float64(0.5), numpy.bool_(True)]), [3, 0.5, True])


class Text(str):
    pass


def endless() -> Any:
    while True:
        yield 1


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [Text("x"), object(), len, type, endless(), nested(wire.MAX_DEPTH + 1), collections.namedtuple("P", "x")(1)],
    ids=["str-subclass", "object", "function", "class", "endless", "deep", "namedtuple"],
)
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(wire.WireError):
        wire.encode(value)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"a": 1, "b": 2},
        {"unknown": []},
        {"t": 5},
        {"f": "seven"},
        {"f": 7},
        {"i": "0xzz"},
        {"d": [[[1], 2]]},
        {"d": [1]},
        {"s": [[1]]},
        {"r": [1, 2, 0]},
        {"r": [1]},
        {"r": ["a"]},
        {"p": [1, 0]},
        {"n": "x"},
        {"b": "0"},
        {"c": ["0x1p+0"]},
        {"h": 0},
        nested(wire.MAX_DEPTH + 2),
    ],
)
def test_what_nobody_wrote_is_refused(data: Any) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(data)


@pytest.mark.parametrize("text", [b"", b"{", b"1.5", b"NaN", b"[" * 100_000, b"\xff", b"9" * 5000])
def test_text_that_is_no_data_is_refused(text: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.loads(text)


def test_frames_arrive_whole_and_in_order() -> None:
    read, write = os.pipe()
    messages = [{"v": "x" * 300_000}, {"v": [1, 2]}, {}]
    sender = threading.Thread(
        target=lambda: [wire.send_frame(write, message) for message in messages] + [os.close(write)]
    )
    sender.start()
    assert [wire.receive_frame(read, 1 << 20) for _ in messages] == messages
    with pytest.raises(EOFError):
        wire.receive_frame(read, 1 << 20)
    sender.join()
    os.close(read)


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    read, write = os.pipe()
    os.write(write, (1 << 30).to_bytes(4, "little"))
    with pytest.raises(wire.WireError, match="at most"):
        wire.receive_frame(read, 1 << 20)
    os.close(read)
    os.close(write)
