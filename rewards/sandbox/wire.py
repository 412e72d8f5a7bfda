"""Plain data across the jail's wall: values of exact builtin types as JSON, read back by code that trusts none of it.

    None, bool, str, small int   themselves                  list              [...]
    {"i": "0x..."}               int                         {"t": [...]}      tuple
    {"f": "0x1.8p+1"}            float, nan and inf too      {"d": [[k, v]]}   dict
    {"s": [...]}, {"z": [...]}   set, frozenset              {"b": "hex"}      bytes
    {"c": [re, im]}              complex                     {"r": [a, b, c]}  range
    {"it": [...]}                an iterator, run to its end {"q": [...]}      deque
    {"n": "1.5"}, {"p": [n, d]}  Decimal, Fraction           {"h": 3}          a handle to an object that stays

A subclass of a builtin is not plain (Counter, defaultdict and OrderedDict travel as dict; numpy scalars as the number).
"""

from __future__ import annotations

import collections
import decimal
import fractions
import itertools
import json
import os
import types
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 200
MAX_ITEMS = 200_000
"""Most items taken from an iterator."""
MAX_TEXT = 16 << 20
"""Longest text or bytes, in characters."""

_MAX_BRACKETS = 3 * MAX_DEPTH + 10
"""Deepest JSON text: a dict in a dict is three brackets down, and answers stand in an object of their own."""

Hook = Callable[[Any], Any]

_PLAIN: tuple[Any, ...] = ([], (), {}, {}.values(), {}.items(), set(), range(0), "", b"")
_ITERATORS: frozenset[type] = frozenset(
    [types.GeneratorType, map, filter, zip, enumerate, reversed]
    + [type(iter(x)) for x in _PLAIN]
    + [type(reversed(list[int]())), type(reversed(dict[int, int]()))]
    + [itertools.chain, itertools.accumulate, itertools.combinations, itertools.permutations, itertools.product]
    + [itertools.islice, itertools.starmap, itertools.takewhile, itertools.dropwhile, itertools.groupby]
)
_AS_DICT: frozenset[type] = frozenset([dict, collections.Counter, collections.defaultdict, collections.OrderedDict])
_AS_LIST: frozenset[type] = frozenset([type({}.keys()), type({}.values()), type({}.items())])


class WireError(ValueError):
    """A value that is not plain data, or text that is no value."""


def encode(value: Any, opaque: Hook | None = None, depth: int = 0) -> Any:
    """`value` as JSON-able data; what is not plain goes to `opaque` if given, else raises WireError."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind in (str, bytes, bytearray) and len(value) > MAX_TEXT:
        raise WireError(f"{kind.__name__} longer than {MAX_TEXT}")
    if kind is str:
        return value
    if kind is int:
        return value if -(1 << 53) < value < 1 << 53 else {"i": hex(value)}
    if kind is float:
        return {"f": value.hex()}
    if depth >= MAX_DEPTH:
        raise WireError(f"data nested deeper than {MAX_DEPTH}")
    items = _encode_items
    if kind is list or kind in _AS_LIST:
        return items(value, opaque, depth)
    if kind is tuple:
        return {"t": items(value, opaque, depth)}
    if kind in _AS_DICT:
        return {"d": [[encode(k, opaque, depth + 1), encode(v, opaque, depth + 1)] for k, v in dict.items(value)]}
    if kind is set or kind is frozenset:
        return {"s" if kind is set else "z": items(value, opaque, depth)}
    if kind is bytes or kind is bytearray:
        return {"b": bytes(value).hex()}
    if kind is complex:
        return {"c": [value.real.hex(), value.imag.hex()]}
    if kind is range:
        return {"r": [encode(x) for x in (value.start, value.stop, value.step)]}
    if kind in _ITERATORS:
        taken = list(itertools.islice(value, MAX_ITEMS + 1))
        if len(taken) > MAX_ITEMS:
            raise WireError(f"an iterator of more than {MAX_ITEMS} items")
        return {"it": items(taken, opaque, depth)}
    if kind is collections.deque:
        return {"q": items(value, opaque, depth)}
    if kind is decimal.Decimal:
        return {"n": str(value)}
    if kind is fractions.Fraction:
        return {"p": [encode(value.numerator), encode(value.denominator)]}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), opaque, depth + 1)
    if opaque is not None:
        return opaque(value)
    raise WireError(f"a value of type {kind.__name__} is not plain data")


def decode(data: Any, handle: Hook | None = None, depth: int = 0) -> Any:
    """The value that `encode` described, built of exact builtin types. WireError for what it would not have written."""
    kind = type(data)
    if data is None or kind is bool or kind is str or kind is int:
        return data
    if depth > MAX_DEPTH:
        raise WireError(f"data nested deeper than {MAX_DEPTH}")
    if kind is list:
        return [decode(item, handle, depth + 1) for item in data]
    if kind is not dict or len(data) != 1:
        raise WireError("not a value")
    ((tag, body),) = data.items()
    try:
        return _decode_tagged(tag, body, handle, depth + 1)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise WireError(f"not a value: {type(error).__name__}") from error


def dumps(data: Any) -> bytes:
    """JSON text of encoded data, one line of ASCII."""
    return json.dumps(data, separators=(",", ":")).encode()


def loads(text: bytes) -> Any:
    """JSON text that may come from the jail. WireError if it is none, or nested deeper than `dumps` writes."""
    try:
        data = json.loads(text, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON text: {type(error).__name__}") from error
    # What a parser can read, a comparison or a message may still be too shallow a stack for.
    if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS and _is_deeper(data, _MAX_BRACKETS):
        raise WireError(f"data nested deeper than {MAX_DEPTH}")
    return data


def send_frame(descriptor: int, data: Any) -> None:
    """Write one message: four bytes of length, then its text. OSError if the other side is gone."""
    text = dumps(data)
    rest = memoryview(len(text).to_bytes(4, "little") + text)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive_frame(descriptor: int, max_bytes: int) -> Any:
    """Read one message. EOFError if the other side is gone, WireError if it is longer than `max_bytes` or no JSON."""
    size = int.from_bytes(_read_exactly(descriptor, 4), "little")
    if size > max_bytes:
        raise WireError(f"a message of {size} bytes (at most {max_bytes})")
    return loads(_read_exactly(descriptor, size))


def _encode_items(values: Iterable[Any], opaque: Hook | None, depth: int) -> list[Any]:
    return [encode(item, opaque, depth + 1) for item in values]


def _decode_tagged(tag: str, body: Any, handle: Hook | None, depth: int) -> Any:
    if tag == "d":
        return {decode(key, handle, depth): decode(value, handle, depth) for key, value in body}
    if tag == "i":
        return int(_string(body), 16)
    if tag == "f":
        return float.fromhex(_string(body))
    if tag == "c":
        return complex(float.fromhex(_string(body[0])), float.fromhex(_string(body[1])))
    if tag == "b":
        return bytes.fromhex(_string(body))
    if tag == "n":
        return decimal.Decimal(_string(body))
    if tag == "h" and handle is not None:
        return handle(body)
    build = _CONTAINERS.get(tag)
    if build is None or type(body) is not list:
        raise WireError("not a value")
    items = [decode(item, handle, depth) for item in body]
    if tag in _INTS and [type(item) for item in items] != [int] * _INTS[tag]:
        raise WireError("not a value")
    return build(items)


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "t": tuple,
    "s": set,
    "z": frozenset,
    "q": collections.deque,
    "it": iter,
    "r": lambda items: range(*items),
    "p": lambda items: fractions.Fraction(*items),
}


_INTS = {"r": 3, "p": 2}
"""Kinds built of so many ints."""


def _is_deeper(data: Any, depth: int) -> bool:
    """Whether JSON data is nested deeper than that; level by level, for it may be too deep to walk down."""
    level: list[Any] = [data]
    for _ in range(depth):
        containers = [item for item in level if type(item) is list or type(item) is dict]
        if not containers:
            return False
        level = [inner for outer in containers for inner in (outer.values() if type(outer) is dict else outer)]
    return any(type(item) is list or type(item) is dict for item in level)


def _string(body: Any) -> str:
    if type(body) is not str:
        raise WireError("not a value")
    return body


def _refuse(text: str) -> Any:
    raise WireError(f"a bare {text[:20]} is never written")


def _read_exactly(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
