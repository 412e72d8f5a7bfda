"""Polynomials with rational coefficients in named atoms, exponents rational or symbolic: the arithmetic of normal
forms.

A monomial maps atoms (strings) to exponents; a polynomial maps monomials to coefficients. Everything is bounded: what
grows
past the bounds raises TooLargeError and stays symbolic.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, lcm
from typing import TypeAlias

MAX_TERMS = 300
_TRIAL_DIVISION_LIMIT = 1_000
MAX_BITS = 20_000
"""Bits of a coefficient's numerator and denominator together."""

Exponent: TypeAlias = "Fraction | tuple[tuple[Monomial, Fraction], ...]"
"""A rational, or the sorted terms of a polynomial that is no rational."""
Monomial: TypeAlias = "tuple[tuple[str, Exponent], ...]"
Polynomial: TypeAlias = "dict[Monomial, Fraction]"


class TooLargeError(ArithmeticError):
    """The normal form would outgrow its bounds."""


class UndefinedError(ArithmeticError):
    """Division by zero: the expression has no value."""


def constant(value: Fraction) -> Polynomial:
    """The polynomial of a rational."""
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise TooLargeError("a coefficient out of bounds")
    return {(): value} if value else {}


def atom(name: str, exponent: Exponent = Fraction(1)) -> Polynomial:
    """One atom to a power."""
    return {((name, exponent),): Fraction(1)}


def as_constant(polynomial: Polynomial) -> Fraction | None:
    """The rational that this polynomial is, or None."""
    if not polynomial:
        return Fraction(0)
    if len(polynomial) == 1 and () in polynomial:
        return polynomial[()]
    return None


def freeze(polynomial: Polynomial) -> Exponent:
    """A polynomial as an exponent."""
    value = as_constant(polynomial)
    return value if value is not None else tuple(sorted(polynomial.items(), key=repr))


def thaw(exponent: Exponent) -> Polynomial:
    """An exponent as a polynomial."""
    return constant(exponent) if isinstance(exponent, Fraction) else dict(exponent)


def plus(left: Polynomial, right: Polynomial) -> Polynomial:
    """left + right."""
    total = dict(left)
    for monomial, coefficient in right.items():
        value = total.get(monomial, Fraction(0)) + coefficient
        if value:
            total[monomial] = value
        else:
            total.pop(monomial, None)
    if len(total) > MAX_TERMS:
        raise TooLargeError("too many terms")
    return total


def scale(polynomial: Polynomial, factor: Fraction) -> Polynomial:
    """factor * polynomial."""
    return {m: c * factor for m, c in polynomial.items()} if factor else {}


def add_exponents(left: Exponent, right: Exponent) -> Exponent:
    """left + right, both exponents."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left + right
    return freeze(plus(thaw(left), thaw(right)))


def scale_exponent(exponent: Exponent, by: Exponent) -> Exponent:
    """exponent * by."""
    if isinstance(exponent, Fraction) and isinstance(by, Fraction):
        return exponent * by
    if isinstance(by, Fraction):
        return freeze(scale(thaw(exponent), by))
    if isinstance(exponent, Fraction):
        return freeze(scale(thaw(by), exponent))
    return freeze(raw_product(thaw(exponent), thaw(by)))


def merge(left: Monomial, right: Monomial) -> Monomial:
    """The product of two monomials, without the rules of particular atoms."""
    if not left:
        return right
    if not right:
        return left
    powers = dict(left)
    for name, exponent in right:
        powers[name] = add_exponents(powers[name], exponent) if name in powers else exponent
    return tuple(sorted(((n, e) for n, e in powers.items() if e != 0), key=lambda item: item[0]))


def raw_product(left: Polynomial, right: Polynomial) -> Polynomial:
    """left * right, without the rules of particular atoms."""
    if len(left) * len(right) > 4 * MAX_TERMS:
        raise TooLargeError("too many terms")
    total: Polynomial = {}
    for m1, c1 in left.items():
        for m2, c2 in right.items():
            product = c1 * c2
            if product.numerator.bit_length() + product.denominator.bit_length() > MAX_BITS:
                raise TooLargeError("a coefficient out of bounds")
            monomial = merge(m1, m2)
            value = total.get(monomial, Fraction(0)) + product
            if value:
                total[monomial] = value
            else:
                total.pop(monomial, None)
    return total


def spell(polynomial: Mapping[Monomial, Fraction]) -> str:
    """A canonical spelling: equal polynomials are spelled alike."""
    if not polynomial:
        return "0"
    terms = sorted((_spell_monomial(m), c) for m, c in polynomial.items())
    return " + ".join(f"{c}*{m}" if m and c != 1 else (m or str(c)) for m, c in terms)


def _spell_monomial(monomial: Monomial) -> str:
    return "*".join(name if e == 1 else f"{name}^({_spell_exponent(e)})" for name, e in monomial)


def _spell_exponent(exponent: Exponent) -> str:
    return str(exponent) if isinstance(exponent, Fraction) else spell(dict(exponent))


def content_of(polynomial: Polynomial) -> Fraction:
    """The positive rational that divides all coefficients."""
    top = bottom = 0
    for coefficient in polynomial.values():
        top = gcd(top, coefficient.numerator)
        bottom = lcm(bottom or 1, coefficient.denominator)
    return Fraction(top, bottom)


@lru_cache(maxsize=2048)
def factorize(value: int) -> tuple[tuple[int, int], ...]:
    """(factor, power) pairs by trial division up to a bound; what remains is one factor, or the square of one."""
    if value.bit_length() > MAX_BITS:
        raise TooLargeError("a number too large to factor")
    found: list[tuple[int, int]] = []
    divisor = 2
    while divisor <= _TRIAL_DIVISION_LIMIT and divisor * divisor <= value:
        power = 0
        while value % divisor == 0:
            value //= divisor
            power += 1
        if power:
            found.append((divisor, power))
        divisor += 1 if divisor == 2 else 2
    if value > 1:
        root = isqrt(value)
        found.append((root, 2) if root * root == value else (value, 1))
    return tuple(found)
