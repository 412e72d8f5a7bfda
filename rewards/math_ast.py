"""The typed tree an answer is read into. Nodes are immutable and hashable; equal trees are equal answers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

# Positional, unlike the other dataclasses of the project: trees are written and matched by shape.


@dataclass(frozen=True, slots=True)
class Num:
    """An exact rational; a decimal is the fraction it spells."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable or a constant (`pi`, `e`, `i`, `oo`, `R`...)."""

    name: str


@dataclass(frozen=True, slots=True)
class Add:
    """A sum."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mul:
    """A product; a quotient is a product with a power -1."""

    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Pow:
    """A power; a root is a power 1/k."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Fn:
    """A function or an operator kept by name: sin, abs, fact, binom, log(x, base), sum(body, index, low, high),
    f(x)."""

    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Seq:
    """Several values. `kind`: list (bare commas, unordered), tuple, bracket, set, ratio."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """From low to high; an end is in the interval if it is closed."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True)
class SetOp:
    """`union`, `intersection` or `minus` of sets (or of relations: or, and)."""

    op: str
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Rel:
    """A chain of relations: parts[0] ops[0] parts[1] ops[1] ...; ops are = != < <= > >= ~ in and others by name."""

    ops: tuple[str, ...]
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with its unit: `%`, `deg`, `$`, `cm^2`, a word."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of a multiple-choice question, with its text or without (None)."""

    letter: str
    text: Node | None


@dataclass(frozen=True, slots=True)
class Text:
    """Words, or notation that the grammar does not know: equal only if written alike."""

    words: str


Node: TypeAlias = (
    Num | Sym | Add | Mul | Pow | Fn | Seq | Interval | SetOp | Rel | Matrix | Quantity | Choice | Text
)  # fmt: skip

ZERO = Num(Fraction(0))
ONE = Num(Fraction(1))
MINUS_ONE = Num(Fraction(-1))
HALF = Num(Fraction(1, 2))
INFINITY = Sym("oo")


def integer(value: int) -> Num:
    """The node of an integer."""
    return Num(Fraction(value))


def negate(node: Node) -> Node:
    """-node, folded into a number."""
    if isinstance(node, Num):
        return Num(-node.value)
    if isinstance(node, Quantity):
        return Quantity(negate(node.value), node.unit)
    return multiply(MINUS_ONE, node)


def add(*terms: Node) -> Node:
    """A flattened sum."""
    flat: list[Node] = []
    for term in terms:
        flat.extend(term.terms if isinstance(term, Add) else (term,))
    return flat[0] if len(flat) == 1 else Add(tuple(flat))


def multiply(*factors: Node) -> Node:
    """A flattened product."""
    flat: list[Node] = []
    for factor in factors:
        flat.extend(factor.factors if isinstance(factor, Mul) else (factor,))
    return flat[0] if len(flat) == 1 else Mul(tuple(flat))


def divide(numerator: Node, denominator: Node) -> Node:
    """A quotient; of two integers, the fraction, unless the denominator is 0 (which stays, undefined)."""
    if isinstance(denominator, Num) and denominator.value != 0:
        if isinstance(numerator, Num):
            return Num(numerator.value / denominator.value)
        return multiply(numerator, Num(1 / denominator.value))
    return multiply(numerator, Pow(denominator, MINUS_ONE))


def children(node: Node) -> tuple[Node, ...]:
    """The direct subtrees."""
    match node:
        case Add(items) | Mul(items) | Seq(_, items) | Fn(_, items) | SetOp(_, items) | Rel(_, items):
            return items
        case Pow(base, exponent):
            return (base, exponent)
        case Interval(low, high, _, _):
            return (low, high)
        case Matrix(rows):
            return tuple(entry for row in rows for entry in row)
        case Quantity(value, _):
            return (value,)
        case _:
            return ()


def replace_children(node: Node, new: tuple[Node, ...]) -> Node:
    """The same node over other subtrees, in the order of `children`."""
    match node:
        case Add(_):
            return add(*new)
        case Mul(_):
            return multiply(*new)
        case Seq(kind, _):
            return Seq(kind, new)
        case Fn(name, _):
            return Fn(name, new)
        case SetOp(op, _):
            return SetOp(op, new)
        case Rel(ops, _):
            return Rel(ops, new)
        case Pow(_, _):
            return Pow(new[0], new[1])
        case Interval(_, _, low_closed, high_closed):
            return Interval(new[0], new[1], low_closed, high_closed)
        case Matrix(rows):
            entries = iter(new)
            return Matrix(tuple(tuple(next(entries) for _ in row) for row in rows))
        case Quantity(_, unit):
            return Quantity(new[0], unit)
        case _:
            return node


def contains(node: Node, kinds: type | tuple[type, ...]) -> bool:
    """Whether a node of one of these kinds stands anywhere in the tree."""
    return isinstance(node, kinds) or any(contains(child, kinds) for child in children(node))


def symbols(node: Node) -> frozenset[str]:
    """Names of all symbols in the tree."""
    if isinstance(node, Sym):
        return frozenset((node.name,))
    found: frozenset[str] = frozenset()
    for child in children(node):
        found |= symbols(child)
    return found


def depth(node: Node) -> int:
    """Levels of the tree, counted without recursion."""
    level, below = 0, [node]
    while below:
        level += 1
        below = [child for n in below for child in children(n)]
    return level


def render(node: Node, limit: int = 160) -> str:
    """A short plain spelling for people and for opaque names; cut at `limit` characters."""
    text = _render(node)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _render(node: Node) -> str:
    match node:
        case Num(value):
            return (
                str(value) if value.numerator.bit_length() + value.denominator.bit_length() < 2000 else "<big number>"
            )
        case Sym(name):
            return name
        case Add(terms):
            return "(" + " + ".join(map(_render, terms)) + ")"
        case Mul(factors):
            return "*".join(map(_render, factors))
        case Pow(base, exponent):
            return f"{_render(base)}^{_render(exponent)}"
        case Fn(name, args):
            return f"{name}({', '.join(map(_render, args))})"
        case Seq(kind, items):
            left, right = {"tuple": ("(", ")"), "bracket": ("[", "]"), "set": ("{", "}")}.get(kind, ("", ""))
            return left + (":" if kind == "ratio" else ", ").join(map(_render, items)) + right
        case Interval(low, high, low_closed, high_closed):
            return f"{'[' if low_closed else '('}{_render(low)}, {_render(high)}{']' if high_closed else ')'}"
        case SetOp(op, parts):
            return f" {op} ".join(map(_render, parts))
        case Rel(ops, parts):
            return _render(parts[0]) + "".join(f" {op} {_render(p)}" for op, p in zip(ops, parts[1:], strict=True))
        case Matrix(rows):
            return "[" + "; ".join(", ".join(map(_render, row)) for row in rows) + "]"
        case Quantity(value, unit):
            return f"{_render(value)} {unit}"
        case Choice(letter, text):
            return letter if text is None else f"{letter}. {_render(text)}"
        case Text(words):
            return repr(words)
