"""Whether two scalar expressions are equal, by stages: trees, normal forms, numbers to reject, proofs, sympy to
confirm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, TypeAlias

from rewards.math_algebraic import is_proven_zero
from rewards.math_ast import (
    ONE,
    Fn,
    Matrix,
    Mul,
    Node,
    Num,
    Pow,
    Seq,
    Sym,
    add,
    children,
    contains,
    multiply,
    negate,
    render,
    replace_children,
    symbols,
)
from rewards.math_normal import are_same, is_shifted, normal_form
from rewards.math_numeric import compare_numerically, new_context, real_value

Truth = Literal["equal", "different", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict and the stage that reached it."""

    truth: Truth
    stage: str

    @property
    def is_equal(self) -> bool:
        """Whether the answer is right."""
        return self.truth == "equal"


Prover: TypeAlias = Callable[[Node, Node], str]
"""Asks sympy: `equal`, `unproven`, `timeout` or `error`."""

EQUAL_TREES = Outcome("equal", "tree")


def different(stage: str) -> Outcome:
    """Not equal, with the stage or the reason."""
    return Outcome("different", stage)


def all_of(outcomes: list[Outcome]) -> Outcome:
    """Equal if all are; different if one is; otherwise what kept it open."""
    for truth in ("different", "error", "timeout"):
        for outcome in outcomes:
            if outcome.truth == truth:
                return outcome
    return outcomes[-1] if outcomes else EQUAL_TREES


def compare_scalars(gold: Node, answer: Node, prove: Prover) -> Outcome:
    """Whether two expressions have the same value for all their symbols."""
    if gold == answer:
        return EQUAL_TREES
    if isinstance(gold, Num) and isinstance(answer, Num):
        return Outcome("equal", "exact") if gold.value == answer.value else different("exact")
    if Sym("oo") in (gold, answer) or contains_infinity(gold) or contains_infinity(answer):
        one, two = real_value(gold), real_value(answer)
        same = one is not None and one == two and abs(one) == float("inf")
        return Outcome("equal", "infinity") if same else different("infinity")
    if keeps_order(gold) or keeps_order(answer):
        gold, answer = _freeze_products(gold), _freeze_products(answer)
        if gold == answer:
            return EQUAL_TREES
    if abs(len(symbols(gold)) - len(symbols(answer))) > 8:
        return different("symbols")
    one_form, two_form = normal_form(gold), normal_form(answer)
    proven = False
    assumes_positive = True
    if one_form is not None and two_form is not None:
        one_value, two_value = one_form.constant(), two_form.constant()
        assumes_positive = one_form.assumes_positive or two_form.assumes_positive
        if one_value is not None and two_value is not None and not assumes_positive:
            return Outcome("equal", "exact") if one_value == two_value else different("exact")
        proven = are_same(one_form, two_form)
        if not proven and is_shifted(one_form, two_form):
            return different("exact difference")
        if proven and not assumes_positive:
            return Outcome("equal", "normal form")
    if not proven:
        agreement = compare_numerically(gold, answer)
        if agreement == "differ":
            return different("numeric")
        if agreement == "unknown":
            return different("no value to compare and forms differ")
    if compare_numerically(gold, answer, negative_points=True) == "differ":
        return different("numeric, negative values")
    if proven:
        return Outcome("equal", "normal form, positive symbols")
    zero = is_proven_zero(add(gold, negate(answer)), new_context)
    if zero is not None:
        return Outcome("equal", "separation bound") if zero else different("separation bound")
    proof = prove(gold, answer)
    if proof == "equal":
        return Outcome("equal", "sympy")
    if proof in ("timeout", "error"):
        return Outcome("timeout" if proof == "timeout" else "error", "sympy")
    return different("agrees numerically, not proven")


@lru_cache(maxsize=4096)
def contains_infinity(node: Node) -> bool:
    """Whether infinity stands in the tree outside a bound of a sum or a limit."""
    if node == Sym("oo"):
        return True
    if isinstance(node, Fn):
        return False
    return any(contains_infinity(child) for child in children(node))


def rounds_to(exact: Node, decimal: Fraction, places: int) -> bool:
    """Whether the decimal is the exact value rounded to that many places."""
    value = real_value(exact)
    if value is None or not abs(value) < 1e15:
        return False
    return abs(Fraction(value) - decimal) <= Fraction(1, 2 * 10**places) * Fraction(1000001, 1000000)


# Products whose order matters


def keeps_order(node: Node) -> bool:
    """Whether capital letters in the tree look like matrices: something is transposed, or nothing else stands there."""
    return contains_matrix_mark(node) or _only_capitals(node)


@lru_cache(maxsize=4096)
def contains_matrix_mark(node: Node) -> bool:
    """A transpose."""
    if isinstance(node, Fn) and node.name == "transpose":
        return True
    return any(contains_matrix_mark(child) for child in children(node))


def _only_capitals(node: Node) -> bool:
    names = symbols(node)
    return len(names) > 1 and all(len(n) == 1 and n.isupper() for n in names)


def _freeze_products(node: Node) -> Node:
    """Products of several capital letters as one symbol named by the order of its factors."""
    below = tuple(_freeze_products(child) for child in children(node))
    if not isinstance(node, Mul):
        return replace_children(node, below) if below else node
    ordered = [f for f in below if _is_matrix_like(f)]
    if len({_letter(f) for f in ordered}) < 2:
        return replace_children(node, below)
    frozen = Sym("·".join(render(f) for f in ordered))
    rest = tuple(f for f in below if not _is_matrix_like(f))
    return multiply(*rest, frozen) if rest else frozen


def _is_matrix_like(node: Node) -> bool:
    if isinstance(node, Pow) or (isinstance(node, Fn) and node.name == "transpose"):
        return _is_matrix_like(children(node)[0])
    return isinstance(node, Sym) and len(node.name) == 1 and node.name.isalpha() and node.name not in "ei"


def _letter(node: Node) -> str:
    while not isinstance(node, Sym):
        node = children(node)[0]
    return node.name


# Matrices


def fold_matrices(node: Node) -> Node:
    """Sums and products of written-out matrices carried out; anything else as it is."""
    if not contains(node, Matrix) or isinstance(node, Matrix | Seq):
        return node
    match node:
        case _ if not children(node):
            return node
        case Mul(factors):
            folded = [fold_matrices(f) for f in factors]
            result: Node = ONE
            for factor in folded:
                result = _multiply(result, factor)
            return result
        case _:
            below = tuple(fold_matrices(c) for c in children(node))
            if below and all(isinstance(b, Matrix) for b in below) and type(node).__name__ == "Add":
                return _add_matrices([b for b in below if isinstance(b, Matrix)])
            return replace_children(node, below)


def _add_matrices(matrices: list[Matrix]) -> Node:
    shapes = {(len(m.rows), len(m.rows[0])) for m in matrices}
    if len(shapes) != 1:
        return Fn("undefined", tuple(matrices))
    rows, columns = shapes.pop()
    return Matrix(tuple(tuple(add(*(m.rows[i][j] for m in matrices)) for j in range(columns)) for i in range(rows)))


def _multiply(left: Node, right: Node) -> Node:
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        if len(left.rows[0]) != len(right.rows) or len(left.rows) * len(right.rows[0]) * len(right.rows) > 1000:
            return Fn("undefined", (left, right))
        return Matrix(
            tuple(
                tuple(
                    add(*(multiply(a, r[j]) for a, r in zip(row, right.rows, strict=True)))
                    for j in range(len(right.rows[0]))
                )
                for row in left.rows
            )
        )
    if isinstance(left, Matrix) or isinstance(right, Matrix):
        matrix, scalar = (left, right) if isinstance(left, Matrix) else (right, left)
        assert isinstance(matrix, Matrix)
        if scalar == ONE:
            return matrix
        return Matrix(tuple(tuple(multiply(scalar, entry) for entry in row) for row in matrix.rows))
    return right if left == ONE else multiply(left, right)
