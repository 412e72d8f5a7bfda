"""Intervals, inequalities and finite sets of reals as sorted pieces: an interval equals its inequality."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from rewards.math_answer import is_inequality
from rewards.math_ast import INFINITY, Fn, Interval, Node, Num, Rel, Seq, SetOp, Sym, add, contains, negate
from rewards.math_normal import normal_form
from rewards.math_numeric import real_value
from rewards.math_polynomial import as_constant, scale
from rewards.math_scalar import Outcome, Prover, compare_scalars, different

REALS = Sym("bb_R")
_NEGATIVE_INFINITY = negate(INFINITY)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


@dataclass(frozen=True, slots=True)
class RealSet:
    """Pieces from left to right, and the variable they were solved for, if one was named."""

    pieces: tuple[Interval, ...]
    variable: str | None


def is_set_like(node: Node) -> bool:
    """Whether the node can only be a set: not a pair, which may be a point."""
    if isinstance(node, Rel):
        return is_inequality(node) or (
            node.ops == ("in",) and (is_set_like(node.parts[1]) or isinstance(node.parts[1], Seq))
        )
    return isinstance(node, Interval | SetOp) or node == REALS


def real_set(node: Node) -> RealSet | None:
    """The set of reals a node stands for; None if it is none or its ends cannot be ordered."""
    match node:
        case Sym("bb_R"):
            return RealSet((Interval(_NEGATIVE_INFINITY, INFINITY, False, False),), None)
        case Interval(_, _, _, _):
            return _sorted([node], None)
        case Seq("tuple", (low, high)):
            return _sorted([Interval(low, high, False, False)], None)
        case Seq("bracket", (low, high)):
            return _sorted([Interval(low, high, True, True)], None)
        case Seq("set" | "list", items):
            return _sorted([Interval(i, i, True, True) for i in items], None)
        case Rel(("in",), (Sym(name), part)):
            inner = real_set(part)
            return None if inner is None else RealSet(inner.pieces, name)
        case Rel(_, _) if is_inequality(node):
            return _solve(node)
        case SetOp(op, parts):
            return _combine(op, [real_set(p) for p in parts])
        case _:
            return None


def _solve(relation: Rel) -> RealSet | None:
    """A linear inequality in one symbol, or a chain around one symbol, solved."""
    pieces: RealSet | None = None
    for op, left, right in zip(relation.ops, relation.parts, relation.parts[1:], strict=False):
        solved = _solve_one(op, left, right)
        if solved is None:
            return None
        pieces = solved if pieces is None else _combine("intersection", [pieces, solved])
        if pieces is None:
            return None
    return pieces


def _solve_one(op: str, left: Node, right: Node) -> RealSet | None:
    if isinstance(right, Fn) and right.name == "abs":
        op, left, right = _FLIPPED.get(op, op), right, left
    if isinstance(left, Fn) and left.name == "abs":
        # |a| < c lies between -c and c, |a| > c outside.
        halves = [_solve_one(op, left.args[0], right), _solve_one(_FLIPPED.get(op, op), left.args[0], negate(right))]
        size = real_value(right)
        if size is None or size <= 0:
            return None
        return _combine("intersection" if op in ("<", "<=", "!=") else "union", halves)
    if isinstance(right, Sym) and right.name not in ("oo", "pi", "e"):
        op, left, right = _FLIPPED.get(op, op), right, left
    if isinstance(left, Sym) and left.name not in ("oo", "pi", "e") and real_value(right) is not None:
        return _half_line(op, left.name, right)
    form = normal_form(add(left, negate(right)))
    denominator = None if form is None else as_constant(form.denominator)
    if form is None or denominator is None:
        return None
    total = scale(form.numerator, 1 / denominator)
    linear = {m: c for m, c in total.items() if m}
    if len(linear) != 1:
        return None
    ((monomial, coefficient),) = linear.items()
    if (
        len(monomial) != 1
        or monomial[0][1] != 1
        or not monomial[0][0].replace("_", "").isalnum()
        or monomial[0][0] in "piei"
    ):
        return None
    bound = Num(-total.get((), Fraction(0)) / coefficient)
    return _half_line(op if coefficient > 0 else _FLIPPED.get(op, op), monomial[0][0], bound)


def _half_line(op: str, name: str, bound: Node) -> RealSet:
    low, high = _NEGATIVE_INFINITY, INFINITY
    match op:
        case "<" | "<=":
            return RealSet((Interval(low, bound, False, op == "<="),), name)
        case ">" | ">=":
            return RealSet((Interval(bound, high, op == ">=", False),), name)
        case _:
            return RealSet((Interval(low, bound, False, False), Interval(bound, high, False, False)), name)


def _combine(op: str, sets: list[RealSet | None]) -> RealSet | None:
    if any(s is None for s in sets):
        return None
    known = [s for s in sets if s is not None]
    names = {s.variable for s in known if s.variable is not None}
    if len(names) > 1:
        return None
    variable = names.pop() if names else None
    if op == "union":
        return _sorted([p for s in known for p in s.pieces], variable)
    result = known[0]
    for other in known[1:]:
        if op == "minus":
            complement = _complement(other)
            if complement is None:
                return None
            other = complement
        result_pieces = _intersect(result.pieces, other.pieces)
        if result_pieces is None:
            return None
        result = RealSet(tuple(result_pieces), variable)
    return RealSet(result.pieces, variable)


def _complement(real: RealSet) -> RealSet | None:
    low: Node = _NEGATIVE_INFINITY
    closed = False
    out: list[Interval] = []
    for piece in real.pieces:
        if real_value(piece.low) != float("-inf"):
            out.append(Interval(low, piece.low, closed, not piece.low_closed))
        low, closed = piece.high, not piece.high_closed
    if not real.pieces or real_value(low) != float("inf"):
        out.append(Interval(low, INFINITY, closed, False))
    return _sorted(out, real.variable)


def _intersect(left: tuple[Interval, ...], right: tuple[Interval, ...]) -> list[Interval] | None:
    out: list[Interval] = []
    for a in left:
        for b in right:
            ends = [real_value(e) for e in (a.low, a.high, b.low, b.high)]
            if any(e is None for e in ends):
                return None
            # Of two equal ends the open one binds.
            low_value, low_open, low = max(
                (ends[0], not a.low_closed, a.low), (ends[2], not b.low_closed, b.low), key=_end_key
            )
            high_value, closed, high = min(
                (ends[1], a.high_closed, a.high), (ends[3], b.high_closed, b.high), key=_end_key
            )
            assert low_value is not None
            assert high_value is not None
            if low_value < high_value or (low_value == high_value and closed and not low_open):
                out.append(Interval(low, high, not low_open, closed))
    return out


def _end_key(end: tuple[float | None, bool, Node]) -> tuple[float, bool]:
    assert end[0] is not None
    return end[0], end[1]


def _sorted(pieces: list[Interval], variable: str | None) -> RealSet | None:
    """In order, touching pieces joined. Ends without a value keep a single piece as it is."""
    if len(pieces) == 1:
        return RealSet(tuple(pieces), variable)
    keyed = []
    for piece in pieces:
        low, high = real_value(piece.low), real_value(piece.high)
        if low is None or high is None:
            return None
        keyed.append((low, not piece.low_closed, high, piece))
    keyed.sort(key=lambda item: item[:3])
    out: list[tuple[float, Interval]] = []
    for low, _, high, piece in keyed:
        if out and (low < out[-1][0] or (low == out[-1][0] and (piece.low_closed or out[-1][1].high_closed))):
            last_high, last = out[-1]
            if high > last_high or (high == last_high and piece.high_closed):
                out[-1] = (high, Interval(last.low, piece.high, last.low_closed, piece.high_closed))
            continue
        out.append((high, piece))
    return RealSet(tuple(p for _, p in out), variable)


def compare_sets(gold: RealSet, answer: RealSet, prove: Prover) -> Outcome:
    """Whether the pieces are the same, end by end."""
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return different("another variable")
    if len(gold.pieces) != len(answer.pieces):
        return different("another number of intervals")
    stage = "tree"
    for g, a in zip(gold.pieces, answer.pieces, strict=True):
        if (g.low_closed, g.high_closed) != (a.low_closed, a.high_closed):
            return different("an end open in one and closed in the other")
        for one, two in ((g.low, a.low), (g.high, a.high)):
            outcome = compare_scalars(one, two, prove)
            if not outcome.is_equal:
                return outcome
            stage = outcome.stage
    return Outcome("equal", f"intervals, {stage}")


def has_infinite_part(node: Node) -> bool:
    """Whether an interval or an inequality stands in the tree."""
    return contains(node, (Interval, SetOp)) or is_set_like(node)
