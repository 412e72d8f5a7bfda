r"""Numbers as people write them: repeating decimals, scientific notation, mixed numbers. Exact, and bounded in
digits."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from rewards.latex import Token
from rewards.math_ast import Node, Num, Pow, integer, multiply

if TYPE_CHECKING:
    from rewards.math_parser import Parser

MAX_DIGITS = 2_000
"""Digits of one number; an exponent of ten in scientific notation counts as that many."""


class NotMathError(ValueError):
    """The text is not an expression of the grammar, or is larger than its bounds."""


def read_number(parser: Parser, token: Token) -> Node:
    """The number of a token that was just taken, with what follows and belongs to it."""
    text = token.value
    if len(text) > MAX_DIGITS:
        raise NotMathError(f"a number of {len(text)} digits")
    repeating = _repeating(parser, text)
    if repeating is not None:
        return repeating
    value = Fraction(text)
    following = parser.peek()
    if following.kind == "sym" and following.value in ("e", "E") and not following.spaced:
        scaled = _scientific(parser, value)
        if scaled is not None:
            return scaled
    if text.isdigit():
        mixed = _mixed(parser, value)
        if mixed is not None:
            return mixed
    return Num(value)


def _repeating(parser: Parser, text: str) -> Node | None:
    r"""`0.1\overline{6}`, `0.\dot{3}`, and `0.333...` with a block written three times or more."""
    whole, point, tail = text.partition(".")
    mark = parser.peek()
    if mark.value in (r"\overline", r"\dot", r"\bar") and parser.peek(1).value == "{" and parser.peek(2).kind == "num":
        if not point and parser.peek(-2).value != ".":
            return None
        digits = parser.peek(2).value
        if parser.peek(3).value != "}" or not digits.isdigit():
            return None
        parser.position += 4
    elif mark.value == "." and parser.peek(1).value in (r"\overline", r"\dot", r"\bar") and not point:
        parser.take()
        return _repeating(parser, text + ".")
    elif mark.value == r"\ldots" and point:
        found = _repeated_block(tail)
        if found is None:
            return None
        parser.take()
        tail, digits = found
    else:
        return None
    scale = 10 ** len(tail)
    block = Fraction(int(digits), 10 ** len(digits) - 1)
    return Num(Fraction(int(whole or "0") * scale + int(tail or "0"), scale) + block / scale)


def _scientific(parser: Parser, value: Fraction) -> Node | None:
    """`1.5e-3`: the letter, a sign or none, digits, and no symbol that would make it a product."""
    ahead = 2 if parser.peek(1).value in ("+", "-") else 1
    digits = parser.peek(ahead)
    if digits.kind != "num" or not digits.value.isdigit() or digits.spaced:
        return None
    exponent = int(digits.value[:9])
    negative = parser.peek(1).value == "-"
    parser.position += ahead + 1
    power = integer(-exponent if negative else exponent)
    if exponent > MAX_DIGITS:
        return multiply(Num(value), Pow(integer(10), power))
    return Num(value * Fraction(10) ** int(power.value))


def _mixed(parser: Parser, whole: Fraction) -> Node | None:
    r"""`2\frac{1}{3}`, `2 1/3`: a whole number and a proper fraction of integers."""
    token = parser.peek()
    start = parser.position
    if token.value == r"\frac":
        saved = list(parser.tokens)
        parser.take()
        try:
            part = _proper_fraction(parser.argument(), parser.argument())
        except NotMathError:
            part = None
        if part is not None and parser.peek().value != "^":
            return Num(whole + part)
        parser.tokens, parser.position = saved, start
        return None
    if token.kind == "num" and token.spaced and parser.peek(1).value == "/" and parser.peek(2).kind == "num":
        part = _proper_fraction(Num(Fraction(token.value)), Num(Fraction(parser.peek(2).value)))
        if part is None or parser.peek(3).value == "^":
            raise NotMathError("a mixed number with an improper fraction")
        parser.position += 3
        return Num(whole + part)
    return None


def _proper_fraction(top: Node, bottom: Node) -> Fraction | None:
    """top / bottom if that is a proper fraction of integers."""
    if not isinstance(top, Num) or not isinstance(bottom, Num):
        return None
    is_whole = top.value.denominator == bottom.value.denominator == 1
    return top.value / bottom.value if is_whole and 0 <= top.value < bottom.value else None


def _repeated_block(tail: str) -> tuple[str, str] | None:
    """Splits the decimals of `0.1666...` into what precedes the repetition and the repeated block."""
    for size in range(1, len(tail) // 2 + 1):
        block = tail[-size:]
        times = 1
        while tail[: len(tail) - times * size].endswith(block):
            times += 1
        if times >= (3 if size == 1 else 2):
            return tail[: len(tail) - times * size], block
    return None
