"""Normal forms: a scalar expression as a quotient of polynomials in canonical atoms. Equal normal forms prove equality.

Symbols are taken as positive where a rule needs it (`sqrt(x^2) = x`); whoever relies on a proof that did so checks
negative
values numerically too (`NormalForm.assumes_positive`). Unequal normal forms prove nothing unless both are rationals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

from rewards.math_ast import Add, Fn, Mul, Node, Num, Pow, Sym
from rewards.math_functions import normalize_function, special_cosine
from rewards.math_polynomial import (
    MAX_BITS,
    Exponent,
    Monomial,
    Polynomial,
    TooLargeError,
    UndefinedError,
    as_constant,
    atom,
    constant,
    content_of,
    factorize,
    freeze,
    plus,
    raw_product,
    scale,
    scale_exponent,
    spell,
)  # fmt: skip

_MAX_EXPANDED_POWER = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalForm:
    """numerator / denominator."""

    numerator: Polynomial
    """In canonical atoms."""
    denominator: Polynomial
    """Never zero."""
    bases: Mapping[str, Polynomial]
    """The sums that stand under fractional or symbolic powers, by atom."""
    assumes_positive: bool
    """Some rule took a symbol as positive."""

    def constant(self) -> Fraction | None:
        """The rational this is, or None."""
        top, bottom = as_constant(self.numerator), as_constant(self.denominator)
        return None if top is None or bottom is None else top / bottom


@lru_cache(maxsize=4096)
def normal_form(node: Node) -> NormalForm | None:
    """The normal form of a scalar expression; None if it is undefined, not scalar, or larger than the bounds."""
    try:
        rules = Normalizer({})
        top, bottom = rules.quotient(node)
    except (ArithmeticError, RecursionError, NotScalarError):
        return None
    return NormalForm(numerator=top, denominator=bottom, bases=rules.bases, assumes_positive=rules.assumes_positive)


def are_same(left: NormalForm, right: NormalForm) -> bool:
    """Whether the two quotients are equal by cross multiplication. False where the product is out of bounds."""
    if left.denominator == right.denominator:
        return left.numerator == right.numerator
    try:
        rules = Normalizer({**left.bases, **right.bases})
        return rules.product(left.numerator, right.denominator) == rules.product(right.numerator, left.denominator)
    except ArithmeticError:
        return False


def is_shifted(left: NormalForm, right: NormalForm) -> bool:
    """Whether the two differ by a rational that is not zero: proof that they are not equal."""
    if left.denominator != right.denominator or as_constant(left.denominator) is None:
        return False
    difference = as_constant(plus(left.numerator, scale(right.numerator, Fraction(-1))))
    return difference is not None and difference != 0


class NotScalarError(TypeError):
    """A set, a relation or words where a number is needed."""


Quotient: TypeAlias = tuple[Polynomial, Polynomial]
ONE_POLYNOMIAL: Polynomial = {(): Fraction(1)}


class Normalizer:
    """The rules of the atoms. `bases` collects the sums under powers; `assumes_positive` whether a rule needed it."""

    def __init__(self, bases: dict[str, Polynomial]) -> None:
        self.bases = bases
        self.assumes_positive = False

    # Arithmetic of quotients

    def quotient(self, node: Node) -> Quotient:
        """The normal form of a tree, as numerator and denominator."""
        match node:
            case Num(value):
                return constant(value), ONE_POLYNOMIAL
            case Sym("oo"):
                raise UndefinedError("infinity is no number")
            case Sym(name):
                return atom(name), ONE_POLYNOMIAL
            case Add(terms):
                total: Quotient = ({}, ONE_POLYNOMIAL)
                for term in terms:
                    total = self.sum(total, self.quotient(term))
                return total
            case Mul(factors):
                result: Quotient = (ONE_POLYNOMIAL, ONE_POLYNOMIAL)
                for factor in factors:
                    result = self.times(result, self.quotient(factor))
                return result
            case Pow(base, exponent):
                return self.power(self.quotient(base), self.quotient(exponent))
            case Fn(name, args):
                return normalize_function(self, name, args)
            case _:
                raise NotScalarError(type(node).__name__)

    def sum(self, left: Quotient, right: Quotient) -> Quotient:
        """left + right."""
        if left[1] == right[1]:
            return plus(left[0], right[0]), left[1]
        top = plus(self.product(left[0], right[1]), self.product(right[0], left[1]))
        return top, self.product(left[1], right[1])

    def times(self, left: Quotient, right: Quotient) -> Quotient:
        """left * right, with what cancels at sight cancelled."""
        if left[0] == right[1]:
            return self.tidy(right[0], left[1])
        if right[0] == left[1]:
            return self.tidy(left[0], right[1])
        return self.tidy(self.product(left[0], right[0]), self.product(left[1], right[1]))

    def tidy(self, top: Polynomial, bottom: Polynomial) -> Quotient:
        """A denominator of one term moves into the numerator, unless a rule needs it below."""
        if not bottom:
            raise UndefinedError("division by zero")
        if len(bottom) == 1 and bottom != ONE_POLYNOMIAL:
            ((monomial, coefficient),) = bottom.items()
            if not any(name.startswith("sin(") for name, _ in monomial):
                inverse = tuple((n, scale_exponent(e, Fraction(-1))) for n, e in monomial)
                return self.product(top, self.reduce(inverse, 1 / coefficient)), ONE_POLYNOMIAL
        return top, bottom

    def product(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """left * right under the rules of the atoms."""
        if left == ONE_POLYNOMIAL:
            return right
        if right == ONE_POLYNOMIAL:
            return left
        raw = raw_product(left, right)
        if not any(_has_rule(name) for monomial in raw for name, _ in monomial):
            return raw
        total: Polynomial = {}
        for monomial, coefficient in raw.items():
            total = plus(total, self.reduce(monomial, coefficient))
        return total

    def reduce(self, monomial: Monomial, coefficient: Fraction) -> Polynomial:
        """One term under the rules: i^2 = -1, 2^(3/2) = 2 * 2^(1/2), sin^2 = 1 - cos^2, sqrt(s)^2 = s."""
        kept: list[tuple[str, Exponent]] = []
        expanded: list[Polynomial] = []
        for name, exponent in monomial:
            if not _has_rule(name):
                kept.append((name, exponent))
                continue
            whole = _whole_part(exponent)
            if name == "i":
                coefficient, rest = _reduce_imaginary(coefficient, exponent)
            elif name == "#-1":
                coefficient, rest = coefficient * (-1) ** (whole % 2), _minus(exponent, whole)
            elif name[0] == "#":
                coefficient, rest = coefficient * _bounded_power(Fraction(name[1:]), whole), _minus(exponent, whole)
            elif name.startswith("sin("):
                squares = whole // 2 if whole >= 2 and isinstance(exponent, Fraction) else 0
                rest = _minus(exponent, 2 * squares)
                if squares:
                    cosine = atom("cos(" + name[4:], Fraction(2))
                    expanded.append(self.whole_power(plus(ONE_POLYNOMIAL, scale(cosine, Fraction(-1))), squares))
            elif isinstance(exponent, Fraction) and whole >= 1:
                rest = _minus(exponent, whole)
                expanded.append(self.whole_power(self.bases[name], whole))
            else:
                rest = exponent
            if rest != 0:
                kept.append((name, rest))
        if coefficient.numerator.bit_length() + coefficient.denominator.bit_length() > MAX_BITS:
            raise TooLargeError("a coefficient out of bounds")
        result: Polynomial = {tuple(kept): coefficient}
        for factor in expanded:
            result = self.product(result, factor)
        return result

    def whole_power(self, base: Polynomial, exponent: int) -> Polynomial:
        """base ** exponent, exponent >= 0."""
        if len(base) > 1 and exponent > _MAX_EXPANDED_POWER:
            raise TooLargeError("a power of a sum out of bounds")
        result = ONE_POLYNOMIAL
        for _ in range(exponent):
            result = self.product(result, base)
        return result

    # Powers

    def power(self, base: Quotient, exponent: Quotient) -> Quotient:
        """base ** exponent."""
        if exponent[1] != ONE_POLYNOMIAL:
            frozen: Exponent = ((((f"[{spell(exponent[0])}]/[{spell(exponent[1])}]", Fraction(1)),), Fraction(1)),)
        else:
            frozen = freeze(exponent[0])
        if not base[0]:
            if isinstance(frozen, Fraction) and frozen > 0:
                return {}, ONE_POLYNOMIAL
            raise UndefinedError("a power of zero")
        if isinstance(frozen, Fraction) and frozen.denominator == 1:
            return self.integer_power(base, frozen.numerator)
        top = self.one_side_power(base[0], frozen)
        if base[1] == ONE_POLYNOMIAL:
            return top
        self.assumes_positive = True
        bottom = self.one_side_power(base[1], frozen)
        return self.times(top, (bottom[1], bottom[0]))

    def integer_power(self, base: Quotient, exponent: int) -> Quotient:
        """base ** exponent for an integer; a quotient of single terms to any size of exponent within the bit budget."""
        top, bottom = base if exponent >= 0 else (base[1], base[0])
        size = abs(exponent)
        if len(top) > 1 or len(bottom) > 1:
            return self.tidy(self.whole_power(top, size), self.whole_power(bottom, size))
        return self.tidy(self.term_power(top, size), self.term_power(bottom, size))

    def term_power(self, term: Polynomial, exponent: int) -> Polynomial:
        """A single term to an integer power."""
        ((monomial, coefficient),) = term.items()
        raised = tuple((n, scale_exponent(e, Fraction(exponent))) for n, e in monomial)
        return self.reduce(raised if exponent else (), _bounded_power(coefficient, exponent))

    def one_side_power(self, base: Polynomial, exponent: Exponent) -> Quotient:
        """A polynomial to a power that is no integer."""
        if len(base) == 1:
            ((monomial, coefficient),) = base.items()
            return self.monomial_power(monomial, coefficient, exponent)
        common = _common_monomial(base)
        if common:
            self.assumes_positive = True
            inverse = tuple((n, -e) for n, e in common)
            common_power = self.monomial_power(tuple(common), Fraction(1), exponent)
            return self.times(common_power, self.one_side_power(self.product(base, {inverse: Fraction(1)}), exponent))
        content = content_of(base)
        primitive = scale(base, 1 / content)
        name = f"({spell(primitive)})"
        self.bases[name] = primitive
        outside, below = self.rational_power(content, exponent)
        if not isinstance(exponent, Fraction):
            return self.product(outside, atom(name, exponent)), below
        whole = exponent.numerator // exponent.denominator
        fractional = atom(name, exponent - whole)
        power = self.whole_power(primitive, abs(whole))
        if whole >= 0:
            return self.product(outside, self.product(fractional, power)), below
        return self.product(outside, fractional), self.product(below, power)

    def monomial_power(self, monomial: Monomial, coefficient: Fraction, exponent: Exponent) -> Quotient:
        """A single term to a power that is no integer."""
        result, below = self.rational_power(coefficient, exponent)
        if any("(" in name and name[0] != "(" and power != 1 for name, power in monomial):
            # sqrt(cos^2) is |cos|, and a function has no sign that could be assumed.
            name = f"({spell({monomial: Fraction(1)})})"
            self.bases[name] = {monomial: Fraction(1)}
            return self.product(result, self.reduce(((name, exponent),), Fraction(1))), below
        for name, power in monomial:
            if name == "i" and isinstance(exponent, Fraction):
                raise TooLargeError("a root of the imaginary unit")
            if name not in ("e", "pi") and not name.startswith("#"):
                self.assumes_positive = True
            raised = scale_exponent(power, exponent)
            if name == "e":
                turned = self.euler(raised)
                if turned is not None:
                    result = self.product(result, turned)
                    continue
            result = self.product(result, self.reduce(((name, raised),), Fraction(1)))
        return result, below

    def euler(self, exponent: Exponent) -> Polynomial | None:
        """e^(i pi q + rest) as (cos + i sin) e^rest for the angles that have a value; None for the others."""
        if isinstance(exponent, Fraction):
            return None
        turn = dict(exponent)
        logarithms = [m for m in turn if any(n.startswith("ln(") and n[3:-1].isalnum() and e == 1 for n, e in m)]
        if logarithms:
            # e^(a ln 2) = 2^a
            value = ONE_POLYNOMIAL
            for monomial in logarithms:
                name = next(n for n, e in monomial if n.startswith("ln(") and n[3:-1].isalnum() and e == 1)
                factor = freeze({tuple(item for item in monomial if item[0] != name): turn.pop(monomial)})
                base = f"#{name[3:-1]}" if name[3:-1].isdigit() else name[3:-1]
                value = self.product(value, self.reduce(((base, factor),), Fraction(1)))
            left = freeze(turn)
            return value if left == 0 else self.product(value, atom("e", left))
        angle = turn.pop((("i", Fraction(1)), ("pi", Fraction(1))), None)
        if angle is None:
            return None
        cosine, sine = special_cosine(angle), special_cosine(angle - Fraction(1, 2))
        if cosine is None or sine is None:
            return None
        value = plus(cosine, self.product(sine, atom("i")))
        rest = freeze(turn)
        return value if rest == 0 else self.product(value, atom("e", rest))

    def rational_power(self, base: Fraction, exponent: Exponent) -> Quotient:
        """A rational to a power that is no integer, over its primes. An odd root of a negative number is real."""
        result = ONE_POLYNOMIAL
        if base < 0:
            if not isinstance(exponent, Fraction):
                result = self.reduce((("#-1", exponent),), Fraction(1))
            elif exponent.denominator == 2:
                result = self.reduce((("i", Fraction(exponent.numerator)),), Fraction(1))
            elif exponent.denominator % 2:
                result = constant(Fraction(-1 if exponent.numerator % 2 else 1))
            else:
                raise TooLargeError("an even root of a negative number")
        for value, sign in ((abs(base.numerator), 1), (base.denominator, -1)):
            for prime, power in factorize(value):
                raised = scale_exponent(exponent, Fraction(power * sign))
                result = self.product(result, self.reduce(((f"#{prime}", raised),), Fraction(1)))
        return result, ONE_POLYNOMIAL

    def spell(self, value: Quotient) -> str:
        """A canonical name for a quotient."""
        top, bottom = value
        return spell(top) if bottom == ONE_POLYNOMIAL else f"[{spell(top)}]/[{spell(bottom)}]"


def _has_rule(name: str) -> bool:
    return name[0] in "#(" or name == "i" or name.startswith("sin(")


def _whole_part(exponent: Exponent) -> int:
    value = exponent if isinstance(exponent, Fraction) else dict(exponent).get((), Fraction(0))
    return value.numerator // value.denominator


def _minus(exponent: Exponent, whole: int) -> Exponent:
    return exponent - whole if isinstance(exponent, Fraction) else freeze(plus(dict(exponent), {(): Fraction(-whole)}))


def _reduce_imaginary(coefficient: Fraction, exponent: Exponent) -> tuple[Fraction, Exponent]:
    if not isinstance(exponent, Fraction) or exponent.denominator != 1:
        raise TooLargeError("a power of the imaginary unit")
    turns = exponent.numerator % 4
    return (coefficient if turns < 2 else -coefficient), Fraction(turns % 2)


def _bounded_power(base: Fraction, exponent: int) -> Fraction:
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(base) != 1 and bits * abs(exponent) > 2 * MAX_BITS:
        raise TooLargeError("a power out of bounds")
    if base == 0 and exponent < 0:
        raise UndefinedError("division by zero")
    return base ** (exponent if abs(base) != 1 else exponent % 2)


def _common_monomial(polynomial: Polynomial) -> list[tuple[str, Fraction]]:
    """The atoms that divide every term, with their least rational exponents; negative exponents count as common."""
    lowest: dict[str, Fraction] = {}
    for name in {name for monomial in polynomial for name, _ in monomial if not _has_rule(name)}:
        exponents = [dict(monomial).get(name, Fraction(0)) for monomial in polynomial]
        rational = [e for e in exponents if isinstance(e, Fraction)]
        if len(rational) == len(exponents) and min(rational) != 0:
            lowest[name] = min(rational)
    return sorted(lowest.items())
