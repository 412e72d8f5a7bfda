"""Countdown: reach the target from the given numbers, each used exactly once, with `+ - * /` and parentheses.

Rows are those of Countdown-Tasks-3to4: `nums` (list of ints) and `target` (int). The answer is the last
`<answer>...</answer>` after the last `</think>`. It must be an arithmetic expression and nothing else: no `= target`
behind it (TinyZero gives that no credit either), no unary sign, no `**`, `//`, `%`, no decimal point, no leading zero,
no digit outside ASCII. Values are exact fractions, so `8/(3-8/3)` is 24 and nothing else comes out as 24 by rounding.

Text of the model is tokenized and parsed here into a tree; nothing of it is ever evaluated as Python.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, TypeAlias

from rewards.types import Problem, RewardResult

MAX_LENGTH: Final = 1024
"""Longest answer that is read, in characters."""
MAX_DEPTH: Final = 64
"""Deepest nesting of operations or parentheses that is read; bounds the recursion of `parse` and `evaluate`."""
MAX_DIGITS: Final = 18
"""Longest integer that is read, in digits; keeps exact arithmetic cheap."""

Operator = Literal["+", "-", "*", "/"]
_APPLY: Final = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_DIGITS: Final = frozenset("0123456789")
_SYMBOLS: Final = frozenset("+-*/()")
_WHITE_SPACE: Final = frozenset(" \t\r\n")


class ExpressionError(ValueError):
    """The text is not an expression of the grammar; the message says where and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A literal."""

    value: int
    """Non-negative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One of the four operations on two expressions."""

    operator: Operator
    """The sign as written."""
    left: Expression
    """The first operand."""
    right: Expression
    """The second operand."""
    depth: int
    """Operations on the longest way down, this one included."""


Expression: TypeAlias = Number | Operation


def countdown_reward(problem: Problem, completion: str) -> RewardResult:
    """1.0 if the answer uses each number once and equals the target, else 0.0 with the reason in `detail`.

    Status is `unparsed` when there is no answer or it is not an expression. Raises ValueError if the problem's columns
    `nums` and `target` are missing or are not integers: that is the dataset's fault, not the completion's.
    """
    numbers, target = _read_columns(problem)
    answer = extract(completion)
    if answer is None:
        return RewardResult(reward=0.0, status="unparsed", detail="no <answer>...</answer> after the reasoning")
    try:
        expression = parse(answer)
    except ExpressionError as error:
        return RewardResult(reward=0.0, status="unparsed", detail=f"not an expression: {error}")
    used = sorted(literals(expression))
    if used != sorted(numbers):
        return RewardResult(reward=0.0, detail=f"uses the numbers {_join(used)}; given {_join(sorted(numbers))}")
    try:
        value = evaluate(expression)
    except ZeroDivisionError:
        return RewardResult(reward=0.0, detail="division by zero")
    if value != target:
        return RewardResult(reward=0.0, detail=f"equals {value}, target {target}")
    return RewardResult(reward=1.0, detail=f"equals the target {target}")


def extract(completion: str) -> str | None:
    """The text of the last `<answer>...</answer>` behind the last `</think>`; None if there is none.

    Reasoning that was opened and never closed holds no answer. Linear in the length of the completion.
    """
    start = completion.rfind("</think>")
    if start == -1 and "<think>" in completion:
        return None
    found = None
    opening = completion.find("<answer>", max(start, 0))
    while opening != -1:
        closing = completion.find("</answer>", opening)
        if closing == -1:
            break
        inner = completion.rfind("<answer>", opening, closing) + len("<answer>")
        found = completion[inner:closing]
        opening = completion.find("<answer>", closing)
    return found


def parse(text: str) -> Expression:
    """The tree of an arithmetic expression, with the usual precedence and left to right; raises ExpressionError."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    tokens = list(_tokenize(text))
    if not tokens:
        raise ExpressionError("empty")
    expression, end = _parse_sum(tokens, 0, nesting=0)
    if end < len(tokens):
        raise ExpressionError(f"{tokens[end]!r} is out of place")
    return expression


def evaluate(expression: Expression) -> Fraction:
    """The exact value; raises ZeroDivisionError where it has none."""
    if isinstance(expression, Number):
        return Fraction(expression.value)
    value: Fraction = _APPLY[expression.operator](evaluate(expression.left), evaluate(expression.right))
    return value


def literals(expression: Expression) -> Iterator[int]:
    """The numbers of an expression, from left to right."""
    if isinstance(expression, Number):
        yield expression.value
    else:
        yield from literals(expression.left)
        yield from literals(expression.right)


def _tokenize(text: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        character = text[position]
        end = position + 1
        if character in _DIGITS:
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            literal = text[position:end]
            if len(literal) > MAX_DIGITS:
                raise ExpressionError(f"a number of more than {MAX_DIGITS} digits")
            if literal[0] == "0" and literal != "0":
                raise ExpressionError(f"{literal!r} has a leading zero")
            yield literal
        elif character in _SYMBOLS:
            yield character
        elif character not in _WHITE_SPACE:
            raise ExpressionError(f"{character!r} is not allowed")
        position = end


def _parse_sum(tokens: Sequence[str], position: int, *, nesting: int) -> tuple[Expression, int]:
    left, position = _parse_product(tokens, position, nesting=nesting)
    while position < len(tokens) and (sign := tokens[position]) in ("+", "-"):
        right, position = _parse_product(tokens, position + 1, nesting=nesting)
        left = _operation(sign, left, right)
    return left, position


def _parse_product(tokens: Sequence[str], position: int, *, nesting: int) -> tuple[Expression, int]:
    left, position = _parse_operand(tokens, position, nesting=nesting)
    while position < len(tokens) and (sign := tokens[position]) in ("*", "/"):
        right, position = _parse_operand(tokens, position + 1, nesting=nesting)
        left = _operation(sign, left, right)
    return left, position


def _parse_operand(tokens: Sequence[str], position: int, *, nesting: int) -> tuple[Expression, int]:
    if position == len(tokens):
        raise ExpressionError("ends where a number should be")
    token = tokens[position]
    if token[0] in _DIGITS:
        return Number(value=int(token)), position + 1
    if token != "(":
        raise ExpressionError(f"{token!r} where a number should be")
    if nesting == MAX_DEPTH:
        raise ExpressionError(f"parentheses deeper than {MAX_DEPTH}")
    inner, position = _parse_sum(tokens, position + 1, nesting=nesting + 1)
    if position == len(tokens):
        raise ExpressionError("a parenthesis is not closed")
    if tokens[position] != ")":
        raise ExpressionError(f"{tokens[position]!r} is out of place")
    return inner, position + 1


def _operation(sign: str, left: Expression, right: Expression) -> Operation:
    depth = 1 + max(node.depth if isinstance(node, Operation) else 0 for node in (left, right))
    if depth > MAX_DEPTH:
        raise ExpressionError(f"operations deeper than {MAX_DEPTH}")
    return Operation(operator=sign, left=left, right=right, depth=depth)  # type: ignore[arg-type]


def _read_columns(problem: Problem) -> tuple[list[int], int]:
    numbers, target = problem.columns.get("nums"), problem.columns.get("target")
    if (
        not isinstance(numbers, Sequence)
        or isinstance(numbers, str)
        or not numbers
        or not all(_is_integer(number) for number in numbers)
        or not _is_integer(target)
    ):
        raise ValueError(
            f"{problem.source or problem.id}: the countdown reward needs the columns 'nums' (list of integers) "
            f"and 'target' (integer), got nums={numbers!r}, target={target!r}"
        )
    assert isinstance(target, int)
    return list(numbers), target


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 12 else f"{len(numbers)} of them"
