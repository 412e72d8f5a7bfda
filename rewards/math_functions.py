"""Normal forms of functions: logarithms over primes, trigonometry at special angles, factorials, absolute values.

A function without a rule becomes an atom named by its canonical arguments.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, factorial, floor, gcd, lcm
from typing import TYPE_CHECKING

from rewards.math_ast import Add, Fn, Mul, Node, Num, Pow, Sym, children, integer, negate, replace_children
from rewards.math_polynomial import (
    Polynomial,
    TooLargeError,
    UndefinedError,
    as_constant,
    atom,
    constant,
    content_of,
    factorize,
    plus,
    scale,
    spell,
)  # fmt: skip

if TYPE_CHECKING:
    from rewards.math_normal import Normalizer, Quotient

MAX_FACTORIAL = 2_050
_MAX_FACTORIAL_SHIFT = 12
_MAX_MULTIPLE = 8
_ONE: Polynomial = {(): Fraction(1)}


def normalize_function(rules: Normalizer, name: str, args: tuple[Node, ...]) -> Quotient:
    """The normal form of a named function of expressions."""
    if name in ("pm", "mp", "based", "det"):
        raise TooLargeError(f"{name} has no scalar normal form")
    if name in ("sum", "prod", "int", "iint", "iiint", "oint", "lim"):
        return _bound_function(rules, name, args)
    rewritten = _rewrite(name, args)
    if rewritten is not None:
        return rules.quotient(rewritten)
    values = [rules.quotient(arg) for arg in args]
    if len(values) == 1:
        value = values[0]
        known = _known_value(rules, name, value)
        if known is not None:
            return known
    constants = [as_constant(v[0]) if v[1] == _ONE else None for v in values]
    if name in ("gcd", "lcm", "max", "min"):
        if all(c is not None for c in constants) and constants:
            return constant(_fold(name, [c for c in constants if c is not None])), _ONE
        return atom(f"{name}({', '.join(sorted(rules.spell(v) for v in values))})"), _ONE
    return atom(f"{name}({', '.join(rules.spell(v) for v in values)})"), _ONE


def _rewrite(name: str, args: tuple[Node, ...]) -> Node | None:
    """Functions that are others written short."""
    match name, args:
        case "tan", (x,):
            return Mul((Fn("sin", (x,)), Pow(Fn("cos", (x,)), integer(-1))))
        case "cot", (x,):
            return Mul((Fn("cos", (x,)), Pow(Fn("sin", (x,)), integer(-1))))
        case "sec", (x,):
            return Pow(Fn("cos", (x,)), integer(-1))
        case "csc", (x,):
            return Pow(Fn("sin", (x,)), integer(-1))
        case "log", (x, base):
            return Mul((Fn("ln", (x,)), Pow(Fn("ln", (base,)), integer(-1))))
        case "sinh", (x,):
            return _half_difference(x, -1)
        case "cosh", (x,):
            return _half_difference(x, 1)
        case "tanh", (x,):
            return Mul((_half_difference(x, -1), Pow(_half_difference(x, 1), integer(-1))))
        case "binom", (n, k):
            if isinstance(n, Num) and isinstance(k, Num):
                return _binomial(n.value, k.value)
            below = Fn("fact", (Add((n, negate(k))),))
            return Mul((Fn("fact", (n,)), Pow(Fn("fact", (k,)), integer(-1)), Pow(below, integer(-1))))
        case _:
            return None


def _half_difference(x: Node, sign: int) -> Node:
    e = Sym("e")
    return Mul((Num(Fraction(1, 2)), Add((Pow(e, x), Mul((integer(sign), Pow(e, negate(x))))))))


def _binomial(n: Fraction, k: Fraction) -> Node | None:
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0 or n > MAX_FACTORIAL:
        return None
    if k > n:
        return integer(0)
    return integer(factorial(int(n)) // factorial(int(k)) // factorial(int(n - k)))


def _fold(name: str, values: list[Fraction]) -> Fraction:
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if any(v.denominator != 1 for v in values):
        raise UndefinedError(f"{name} of fractions")
    whole = [v.numerator for v in values]
    return Fraction(gcd(*whole) if name == "gcd" else lcm(*whole))


def _known_value(rules: Normalizer, name: str, value: Quotient) -> Quotient | None:
    """A function of one argument by its rules; None if it has none that applies."""
    number = as_constant(value[0]) if value[1] == _ONE else None
    match name:
        case "abs" | "norm":
            return _absolute(rules, value, number)
        case "ln":
            return _logarithm(rules, value)
        case "sin" | "cos":
            return _sine_cosine(rules, name, value), _ONE
        case "arcsin" | "arccos" | "arctan":
            angle = _ANGLES[name].get(rules.spell(value))
            return None if angle is None else (scale(atom("pi"), angle), _ONE)
        case "fact":
            return _factorial(rules, value, number)
        case "fact2":
            if number is not None and number.denominator == 1 and -1 <= number <= 300:
                product = 1
                for k in range(int(number), 1, -2):
                    product *= k
                return constant(Fraction(product)), _ONE
            return None
        case "floor" | "ceil":
            if number is None:
                return None
            return constant(Fraction(floor(number) if name == "floor" else ceil(number))), _ONE
        case "sgn":
            return None if number is None else (constant(Fraction((number > 0) - (number < 0))), _ONE)
        case _:
            return None


def _absolute(rules: Normalizer, value: Quotient, number: Fraction | None) -> Quotient | None:
    if number is not None:
        return constant(abs(number)), _ONE
    top, bottom = value
    if bottom != _ONE or any(name == "i" for monomial in top for name, _ in monomial):
        return None
    if len(top) == 1:
        ((monomial, coefficient),) = top.items()
        rules.assumes_positive = rules.assumes_positive or any(
            n[0] != "#" and n not in ("pi", "e") for n, _ in monomial
        )
        return {monomial: abs(coefficient)}, _ONE
    return atom(f"abs({_spell_unsigned(top)[0]})"), _ONE


def _spell_unsigned(polynomial: Polynomial) -> tuple[str, int]:
    """The same spelling for p and -p, and which of the two it is."""
    first, second = spell(polynomial), spell(scale(polynomial, Fraction(-1)))
    return (first, 1) if first >= second else (second, -1)


def _logarithm(rules: Normalizer, value: Quotient) -> Quotient | None:
    """ln of a product over its factors: ln 12 = 2 ln 2 + ln 3, ln(e^x) = x."""
    top, bottom = value
    if bottom != _ONE:
        rules.assumes_positive = True
        above, below = _logarithm(rules, (top, _ONE)), _logarithm(rules, (bottom, _ONE))
        if above is None or below is None:
            return None
        return rules.sum(above, (scale(below[0], Fraction(-1)), below[1]))
    if len(top) != 1:
        content = content_of(top)
        primitive = scale(top, 1 / content)
        rest: Quotient = (atom(f"ln({spell(primitive)})"), _ONE)
        return rest if content == 1 else rules.sum(_logarithm(rules, (constant(content), _ONE)) or rest, rest)
    ((monomial, coefficient),) = top.items()
    if coefficient <= 0 or any(name == "i" for name, _ in monomial):
        return None
    total: Polynomial = {}
    for number, sign in ((coefficient.numerator, 1), (coefficient.denominator, -1)):
        for prime, power in factorize(number):
            total = plus(total, scale(atom(f"ln({prime})"), Fraction(sign * power)))
    for name, exponent in monomial:
        if name == "e":
            term: Polynomial = _ONE
        elif name.startswith("#"):
            term = atom(f"ln({name[1:]})")
        else:
            rules.assumes_positive = rules.assumes_positive or name != "pi"
            term = atom(f"ln({name.strip('()') if name[0] == '(' else name})")
        factor = constant(exponent) if isinstance(exponent, Fraction) else dict(exponent)
        total = plus(total, rules.product(factor, term))
    return total, _ONE


def special_cosine(turn: Fraction) -> Polynomial | None:
    """cos(pi * turn) where it has a form in square roots of integers that everybody writes; None elsewhere."""
    turn = turn % 2
    if turn > 1:
        turn = 2 - turn
    sign = 1
    if turn > Fraction(1, 2):
        turn, sign = 1 - turn, -1
    value = _COSINES.get(turn)
    return None if value is None else scale(value, Fraction(sign))


def _root(n: int, factor: Fraction) -> Polynomial:
    return {((f"#{n}", Fraction(1, 2)),): factor}


_SIX_MINUS: Polynomial = {(("#2", Fraction(1, 2)), ("#3", Fraction(1, 2))): Fraction(1, 4)}
_COSINES: dict[Fraction, Polynomial] = {
    Fraction(0): {(): Fraction(1)},
    Fraction(1, 6): _root(3, Fraction(1, 2)),
    Fraction(1, 4): _root(2, Fraction(1, 2)),
    Fraction(1, 3): {(): Fraction(1, 2)},
    Fraction(1, 2): {},
    Fraction(1, 5): {(): Fraction(1, 4), **_root(5, Fraction(1, 4))},
    Fraction(2, 5): {(): Fraction(-1, 4), **_root(5, Fraction(1, 4))},
    Fraction(1, 12): {**_SIX_MINUS, **_root(2, Fraction(1, 4))},
    Fraction(5, 12): {**_SIX_MINUS, **_root(2, Fraction(-1, 4))},
}
_TAN_ANGLES = {"0": Fraction(0), "1": Fraction(1, 4), "#3^(1/2)": Fraction(1, 3), "1/3*#3^(1/2)": Fraction(1, 6),
               "-1": Fraction(-1, 4), "-1*#3^(1/2)": Fraction(-1, 3), "-1/3*#3^(1/2)": Fraction(-1, 6)}  # fmt: skip
_SIN_ANGLES = {"0": Fraction(0), "1/2": Fraction(1, 6), "1/2*#2^(1/2)": Fraction(1, 4), "1/2*#3^(1/2)": Fraction(1, 3),
               "1": Fraction(1, 2), "-1/2": Fraction(-1, 6), "-1/2*#2^(1/2)": Fraction(-1, 4),
               "-1/2*#3^(1/2)": Fraction(-1, 3), "-1": Fraction(-1, 2)}  # fmt: skip
_ANGLES = {
    "arctan": _TAN_ANGLES,
    "arcsin": _SIN_ANGLES,
    "arccos": {k: Fraction(1, 2) - v for k, v in _SIN_ANGLES.items()},
}


def _sine_cosine(rules: Normalizer, name: str, value: Quotient) -> Polynomial:
    """Odd and even, shifted by quarter turns, with the values at special angles."""
    top, bottom = value
    rest = dict(top)
    turn = rest.pop((("pi", Fraction(1)),), Fraction(0)) if bottom == _ONE else Fraction(0)
    if not rest:
        special = special_cosine(turn if name == "cos" else turn - Fraction(1, 2))
        if special is not None:
            return special
    if bottom == _ONE:
        expanded = _multiple_angle(rules, name, rest, turn)
        if expanded is not None:
            return expanded
    quarters = (turn * 2).numerator // (turn * 2).denominator if rest or (turn * 2).denominator > 1 else 0
    leftover = turn - Fraction(quarters, 2)
    angle = plus(rest, scale(atom("pi"), leftover)) if leftover else rest
    # sin(x + q/2 pi) and cos(x + q/2 pi) by the quarter.
    quarter = quarters % 4
    kind, sign = {
        ("sin", 0): ("sin", 1), ("sin", 1): ("cos", 1), ("sin", 2): ("sin", -1), ("sin", 3): ("cos", -1),
        ("cos", 0): ("cos", 1), ("cos", 1): ("sin", -1), ("cos", 2): ("cos", -1), ("cos", 3): ("sin", 1),
    }[name, quarter]  # fmt: skip
    spelled, direction = _spell_unsigned(angle)
    if kind == "sin":
        sign *= direction
    suffix = "" if bottom == _ONE else f"/[{spell(bottom)}]"
    return scale(atom(f"{kind}({spelled}{suffix})"), Fraction(sign))


def _multiple_angle(rules: Normalizer, name: str, rest: Polynomial, turn: Fraction) -> Polynomial | None:
    """cos and sin of a sum of integer multiples, over the cos and sin of the single angles; None if it is too long."""
    parts: list[tuple[Polynomial, Polynomial]] = []
    for monomial, coefficient in rest.items():
        if abs(coefficient.numerator) > _MAX_MULTIPLE or len(rest) > 3:
            return None
        angle = spell({monomial: Fraction(1, coefficient.denominator)})
        single = (atom(f"cos({angle})"), atom(f"sin({angle})"))
        parts.extend(
            [single if coefficient > 0 else (single[0], scale(single[1], Fraction(-1)))] * abs(coefficient.numerator)
        )
    if len(parts) < 2 and not (turn and parts):
        return None
    if turn:
        cosine, sine = special_cosine(turn), special_cosine(turn - Fraction(1, 2))
        if cosine is None or sine is None:
            return None
        parts.append((cosine, sine))
    total = parts[0]
    for c, s in parts[1:]:
        total = (
            plus(rules.product(total[0], c), scale(rules.product(total[1], s), Fraction(-1))),
            plus(rules.product(total[1], c), rules.product(total[0], s)),
        )
    return total[0] if name == "cos" else total[1]


def _factorial(rules: Normalizer, value: Quotient, number: Fraction | None) -> Quotient | None:
    """n! of an integer within bounds; of `n + k`, n! (n+1)...(n+k)."""
    if number is not None:
        if number.denominator != 1 or number < 0:
            raise UndefinedError("a factorial of no natural number")
        if number <= MAX_FACTORIAL:
            return constant(Fraction(factorial(int(number)))), _ONE
        # A large factorial over one at a multiple of twelve, so that quotients of neighbours cancel.
        base, product = int(number) // 12 * 12, 1
        for k in range(base + 1, int(number) + 1):
            product *= k
        return scale(atom(f"fact({base})"), constant(Fraction(product)).get((), Fraction(1))), _ONE
    top, bottom = value
    shift = top.get((), Fraction(0))
    whole = shift.numerator // shift.denominator
    if bottom != _ONE or whole == 0 or abs(whole) > _MAX_FACTORIAL_SHIFT:
        return None
    low = plus(top, {(): Fraction(-whole)})
    start: Quotient = (atom(f"fact({spell(low)})"), _ONE)
    rising = _ONE
    for k in range(1, whole + 1) if whole > 0 else range(whole + 1, 1):
        rising = rules.product(rising, plus(low, constant(Fraction(k)) if k else {}))
    return rules.times(start, (rising, _ONE) if whole > 0 else (_ONE, rising))


def _bound_function(rules: Normalizer, name: str, args: tuple[Node, ...]) -> Quotient:
    """Sums, products, integrals and limits stay symbolic; the bound variable is renamed."""
    body, index, *bounds = args
    if isinstance(index, Sym) and index.name:
        body = _substitute(body, index.name, Sym("$"))
        index = Sym("$")
    parts = [rules.spell(rules.quotient(body))]
    parts += [b.name if isinstance(b, Sym) else rules.spell(rules.quotient(b)) for b in (index, *bounds)]
    return atom(f"{name}({', '.join(parts)})"), _ONE


def _substitute(node: Node, name: str, by: Node) -> Node:
    if isinstance(node, Sym):
        if node.name == name:
            return by
        letter, underscore, index = node.name.partition("_")
        # A subscript is spelled text: the bound letter in it is renamed as text.
        return Sym(f"{letter}_{index.replace(name, '$')}") if underscore and name in index else node
    below = children(node)
    return replace_children(node, tuple(_substitute(child, name, by) for child in below)) if below else node
