"""Numeric values of expressions at seeded points, to reject. Never to accept: agreement is no proof.

The arithmetic is mpmath's, in a context of its own for each call: no precision is shared between threads. Sizes are
checked
before anything large is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from rewards.math_ast import Add, Fn, Mul, Node, Num, Pow, Sym, children, render, symbols

Agreement = Literal["differ", "agree", "unknown"]

_BITS = 110
_CHECK_BITS = 260
_TOLERANCE_BITS = 50
"""Two values are apart if they differ in more than the last 50 bits."""
_MAX_EXPONENT = 10_000
_MAX_LOG = 50_000
_POINTS = 3


class NotNumericError(ValueError):
    """No number can be computed: an unknown function, a size out of bounds, or a value outside the real domain."""


def new_context(bits: int) -> Any:
    """An mpmath context of this precision that nobody else uses."""
    import mpmath

    context = mpmath.MPContext()
    context.prec = bits
    return context


def compare_numerically(left: Node, right: Node, *, negative_points: bool = False) -> Agreement:
    """`differ` if the two expressions have different values at some seeded point; `unknown` if no point could be
    computed.

    With `negative_points`, symbols take negative values too, and only points where both are real throughout count.
    """
    names = sorted(symbols(left) | symbols(right))
    agreed = False
    free = [n for n in names if n not in ("pi", "e", "i")]
    signs = [1] * (_POINTS if free else 1)
    if negative_points and free:
        signs = [-1, -1, 0, 0]
    context = new_context(_BITS)
    for index, sign in enumerate(signs):
        verdict = _agree_at(context, left, right, _point(free, index, sign), real_only=sign != 1)
        if verdict == "differ":
            return "differ"
        agreed = agreed or verdict == "agree"
    return "agree" if agreed else "unknown"


def real_value(node: Node) -> float | None:
    """The value of a real constant expression, for ordering; infinities included; None if it has none."""
    if isinstance(node, Num):
        try:
            return float(node.value)
        except OverflowError:
            return None
    if node == Sym("oo"):
        return float("inf")
    if isinstance(node, Mul) and Sym("oo") in node.factors and len(node.factors) == 2:
        other = node.factors[0] if node.factors[1] == Sym("oo") else node.factors[1]
        sign = real_value(other)
        return None if not sign else float("inf") * sign
    context = new_context(_BITS)
    try:
        value = evaluate(node, context, {})
        return float(value.real) if abs(value.imag) <= abs(value.real) * context.mpf(2) ** -80 else None
    except (ArithmeticError, ValueError, TypeError):
        return None


def _point(names: list[str], index: int, sign: int) -> dict[str, Fraction]:
    """A value for each name, derived from its spelling: the same in every process."""
    point = {}
    for position, name in enumerate(names):
        digest = hashlib.blake2b(f"{name}/{index}".encode(), digest_size=4).digest()
        size = Fraction(int.from_bytes(digest, "big") % 9973 + 2500, 5003) * (1 + 2 * (index % 2))
        is_negative = sign < 0 or (sign == 0 and (position + index) % 2 == 0)
        point[name] = -size if is_negative else size
    return point


def _agree_at(context: Any, left: Node, right: Node, point: Mapping[str, Fraction], *, real_only: bool) -> Agreement:
    verdict: Agreement = "unknown"
    for bits in (_BITS, _CHECK_BITS):
        context.prec = bits
        try:
            first = evaluate(left, context, point, real_only=real_only)
            second = evaluate(right, context, point, real_only=real_only)
        except (ArithmeticError, ValueError, TypeError):
            return "unknown"
        scale = max(abs(first), abs(second))
        if not context.isfinite(scale):
            return "unknown"
        # The second look, at more than twice the precision, guards against cancellation and against near misses alike.
        verdict = "agree" if abs(first - second) <= scale * context.mpf(2) ** (_TOLERANCE_BITS - bits) else "differ"
    return verdict


def evaluate(node: Node, context: Any, point: Mapping[str, Fraction], *, real_only: bool = False) -> Any:
    """The value at a point, in the precision of the context. Raises NotNumericError, or an ArithmeticError of
    mpmath's."""
    match node:
        case Num(value):
            return context.mpf(value.numerator) / context.mpf(value.denominator)
        case Sym("pi"):
            return +context.pi
        case Sym("e"):
            return +context.e
        case Sym("i"):
            return context.mpc(0, 1)
        case Sym(name) if name in point:
            return context.mpf(point[name].numerator) / point[name].denominator
        case Add(terms):
            return context.fsum(evaluate(t, context, point, real_only=real_only) for t in terms)
        case Mul(factors):
            product = context.mpf(1)
            for factor in factors:
                product *= evaluate(factor, context, point, real_only=real_only)
            return product
        case Pow(base, exponent):
            power = _power(
                node, evaluate(base, context, point, real_only=real_only), exponent, context, point, real_only
            )
            return _require_real(power, context) if real_only else power
        case Fn(name, args):
            return _function(name, args, context, point, real_only)
        case _:
            raise NotNumericError(type(node).__name__)


def _require_real(value: Any, context: Any) -> Any:
    if isinstance(value, context.mpc) and abs(value.imag) > abs(value.real) * context.mpf(2) ** -60:
        raise NotNumericError("outside the real domain")
    return value


def _power(node: Pow, base: Any, exponent: Node, context: Any, point: Mapping[str, Fraction], real_only: bool) -> Any:
    if isinstance(exponent, Num):
        ratio = exponent.value
        if ratio.denominator % 2 and ratio.denominator > 1 and isinstance(base, context.mpf) and base < 0:
            # An odd root of a negative number is the real one.
            root = -context.root(-base, ratio.denominator) if ratio.denominator < 1000 else None
            if root is not None and abs(ratio.numerator) <= _MAX_EXPONENT:
                return root**ratio.numerator
    value = evaluate(exponent, context, point, real_only=real_only)
    if abs(value) > _MAX_EXPONENT:
        raise NotNumericError("an exponent out of bounds")
    if base == 0:
        if value == 0 or value.real < 0:
            raise NotNumericError("a power of zero")
        return context.mpf(0)
    if abs(context.log(abs(base))) * abs(value) > _MAX_LOG:
        raise NotNumericError("a power out of bounds")
    return context.power(base, value)


_PLAIN = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc", "sinh": "sinh", "cosh": "cosh",
    "tanh": "tanh",
    "coth": "coth", "sech": "sech", "csch": "csch", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
    "ln": "log",
    "floor": "floor", "ceil": "ceil", "sgn": "sign", "Re": "re", "Im": "im", "arg": "arg", "erf": "erf",
}  # fmt: skip


def _function(name: str, args: tuple[Node, ...], context: Any, point: Mapping[str, Fraction], real_only: bool) -> Any:
    if name not in _PLAIN and name not in ("abs", "norm", "log", "fact", "binom", "max", "min"):
        return _opaque(name, args, context)
    values = [evaluate(a, context, point, real_only=real_only) for a in args]
    if any(abs(v) > 10**12 for v in values) and name not in ("abs", "norm", "ln", "log", "floor", "ceil", "max", "min"):
        raise NotNumericError(f"{name} of a number out of bounds")
    if name in ("abs", "norm"):
        return abs(values[0])
    if name == "log":
        return (
            _require_real(context.log(values[0]) / context.log(values[1]), context)
            if real_only
            else (context.log(values[0]) / context.log(values[1]))
        )
    if name in ("fact", "binom"):
        if any(abs(v) > _MAX_EXPONENT for v in values):
            raise NotNumericError(f"{name} out of bounds")
        return context.gamma(values[0] + 1) if name == "fact" else context.binomial(*values)
    if name in ("max", "min"):
        if any(isinstance(v, context.mpc) for v in values):
            raise NotNumericError(f"{name} of complex numbers")
        return max(values) if name == "max" else min(values)
    value = getattr(context, _PLAIN[name])(values[0])
    return _require_real(value, context) if real_only else value


def _opaque(name: str, args: tuple[Node, ...], context: Any) -> Any:
    """A value for a function that is kept by name, derived from its spelling; its arguments must be spelled alike."""
    if any(children(a) for a in args):
        # f(2x - x) and f(x) are equal and spelled differently: such a value would reject what it must not.
        raise NotNumericError(f"{name} has no numeric value")
    digest = hashlib.blake2b(f"{name}({', '.join(render(a) for a in args)})".encode(), digest_size=4).digest()
    return context.mpf(int.from_bytes(digest, "big") % 9973 + 2500) / 5003
