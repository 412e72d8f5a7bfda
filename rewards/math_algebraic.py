"""A proof that a constant expression in radicals is zero, by a separation bound: no computer algebra, no deadline
needed.

An algebraic number built by + - * / and roots that is not zero cannot be arbitrarily small. The bound is that of
Burnikel,
Funke, Mehlhorn, Schirra and Schmitt, "A separation bound for real algebraic expressions" (ESA 2001): |E| >= u^(1-D) /
l for
u and l kept along the tree and D the product of the degrees of its radicals. A value below the bound, computed with
enough
digits, is zero. Cosines and sines of rational multiples of pi enter as roots of unity.
"""

from __future__ import annotations

from fractions import Fraction
from math import lcm, log2
from typing import Any

from rewards.math_ast import MINUS_ONE, Add, Fn, Mul, Node, Num, Pow, Sym
from rewards.math_numeric import NotNumericError, evaluate

_MAX_BOUND_BITS = 12_000
_MAX_DEGREE = 512
_MAX_ROOT = 32


class _Bound:
    """log2 of u and l for a subtree, and the degrees of all radicals met so far."""

    def __init__(self) -> None:
        self.radicals: dict[Node, int] = {}
        self.turns = 1

    def of(self, node: Node) -> tuple[float, float]:
        """(log2 u, log2 l). Raises NotNumericError for what is no algebraic constant."""
        match node:
            case Num(value):
                return log2(max(abs(value.numerator), 1)), log2(value.denominator)
            case Sym("i"):
                self.radicals[node] = 2
                return 0.0, 0.0
            case Add(terms):
                return self._combine([self.of(t) for t in terms], is_sum=True)
            case Mul(factors):
                return self._combine([self.of(f) for f in factors], is_sum=False)
            case Pow(base, Num(exponent)) if abs(exponent.numerator) <= 4096 and exponent.denominator <= _MAX_ROOT:
                upper, lower = self.of(base)
                if exponent < 0:
                    upper, lower = lower, upper
                size = abs(exponent.numerator)
                upper, lower = upper * size, lower * size
                k = exponent.denominator
                if k == 1:
                    return upper, lower
                self.radicals[node] = k
                return (
                    ((upper + (k - 1) * lower) / k, lower) if upper >= lower else (upper, ((k - 1) * upper + lower) / k)
                )
            case Fn("sin" | "cos", (angle,)):
                turn = _turn(angle)
                if turn is None:
                    raise NotNumericError("an angle that is no rational turn")
                self.turns = lcm(self.turns, 2 * turn.denominator, 4 if node.name == "sin" else 1)
                return 1.0, 1.0
            case _:
                raise NotNumericError("no algebraic constant")

    def _combine(self, parts: list[tuple[float, float]], *, is_sum: bool) -> tuple[float, float]:
        upper, lower = parts[0]
        for next_upper, next_lower in parts[1:]:
            sum_upper = max(upper + next_lower, lower + next_upper) + 1
            upper, lower = sum_upper if is_sum else upper + next_upper, lower + next_lower
        return upper, lower

    def degree(self) -> int:
        """The product of the degrees."""
        product = self.turns
        for k in self.radicals.values():
            product *= k
        return product


def _turn(angle: Node) -> Fraction | None:
    """q if the angle is q * pi for a rational q."""
    factors = angle.factors if isinstance(angle, Mul) else (angle,)
    turn = Fraction(1)
    seen = 0
    for factor in factors:
        if isinstance(factor, Num):
            turn *= factor.value
        elif factor == Sym("pi"):
            seen += 1
        elif (
            isinstance(factor, Pow)
            and isinstance(factor.base, Num)
            and factor.exponent == MINUS_ONE
            and factor.base.value
        ):
            turn /= factor.base.value
        else:
            return None
    return turn if seen == 1 and turn.denominator <= 120 else None


def is_proven_zero(node: Node, context_of: Any) -> bool | None:
    """True: zero, proven. False: not zero, proven. None: no algebraic constant, or the bound is out of reach.

    `context_of(bits)` makes an mpmath context of that precision.
    """
    bound = _Bound()
    try:
        upper, lower = bound.of(node)
    except NotNumericError:
        return None
    degree = bound.degree()
    needed = (degree - 1) * max(upper, 0.0) + lower + 2
    if degree > _MAX_DEGREE or needed > _MAX_BOUND_BITS:
        return None
    bits = int(needed + upper) + 80
    context = context_of(bits)
    try:
        value = abs(evaluate(node, context, {}))
    except (ArithmeticError, ValueError, TypeError):
        return None
    return bool(value < context.mpf(2) ** -int(needed))
