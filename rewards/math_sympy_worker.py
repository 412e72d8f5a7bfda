"""The process that asks sympy whether two expressions are equal. Reads one JSON line a question, answers one a line.

It gets trees, never text: every node is rebuilt from a closed list of constructors, so nothing is evaluated or parsed.
Run by `math_sympy` as `python -m rewards.math_sympy_worker MEMORY_MB`; limits its own address space and processor time.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import sympy

_FUNCTIONS = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "arcsec": sympy.asec,
    "arccsc": sympy.acsc, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "coth": sympy.coth,
    "sech": sympy.sech, "csch": sympy.csch, "arcsinh": sympy.asinh, "arccosh": sympy.acosh, "arctanh": sympy.atanh,
    "ln": sympy.log, "abs": sympy.Abs, "norm": sympy.Abs, "fact": sympy.factorial, "fact2": sympy.factorial2,
    "binom": sympy.binomial, "floor": sympy.floor, "ceil": sympy.ceiling, "sgn": sympy.sign, "max": sympy.Max,
    "min": sympy.Min, "Re": sympy.re, "Im": sympy.im, "arg": sympy.arg, "erf": sympy.erf,
}  # fmt: skip


def build(tree: list[Any]) -> sympy.Expr:
    """A sympy expression from a tree of `math_sympy.encode`; what is not on the list becomes a symbol by its
    spelling."""
    kind, *rest = tree
    if kind == "num":
        return sympy.Rational(int(rest[0]), int(rest[1]))
    if kind == "sym":
        constants = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
        return constants.get(rest[0]) or sympy.Symbol(rest[0], positive=True)
    if kind == "add":
        return sympy.Add(*map(build, rest))
    if kind == "mul":
        return sympy.Mul(*map(build, rest))
    if kind == "pow":
        base, exponent = build(rest[0]), build(rest[1])
        if exponent.is_Rational and exponent.q % 2 and exponent.q > 1 and base.is_negative:
            return sympy.real_root(base, exponent.q) ** exponent.p
        return sympy.Pow(base, exponent)
    if kind == "fn" and rest[0] == "log":
        return sympy.log(build(rest[1])) / sympy.log(build(rest[2]))
    if kind == "fn" and rest[0] in _FUNCTIONS:
        return _FUNCTIONS[rest[0]](*map(build, rest[1:]))
    return sympy.Symbol(json.dumps(tree), positive=True)


def is_zero(difference: sympy.Expr) -> bool:
    """Whether sympy proves that the expression is zero, by the cheap means first."""
    inverse = (sympy.atan, sympy.asin, sympy.acos, sympy.log)
    if not difference.free_symbols and difference.has(*inverse) and _is_zero_constant(difference):
        return True
    for simplify in (sympy.expand, sympy.radsimp, _expand_functions, sympy.sqrtdenest, sympy.trigsimp, sympy.simplify):
        difference = simplify(difference)
        if difference == 0:
            return True
        if difference.is_Number:
            return False
    return not difference.free_symbols and _is_zero_constant(difference)


def _is_zero_constant(difference: sympy.Expr) -> bool:
    """A constant near zero whose tangent is 0, or whose exponential is 1, or whose minimal polynomial is t, is zero."""
    if not abs(difference.evalf(30)) < 1:
        return False
    if difference.has(sympy.atan, sympy.asin, sympy.acos) and difference.is_real:
        return bool(sympy.simplify(sympy.expand_trig(sympy.tan(difference))) == 0)
    if difference.has(sympy.log) and difference.is_real:
        return bool(sympy.simplify(sympy.radsimp(sympy.powsimp(sympy.exp(difference)))) == 1)
    t = sympy.Symbol("t")
    try:
        return bool(sympy.minimal_polynomial(difference, t) == t)
    except sympy.polys.polyerrors.NotAlgebraic:
        return False


def _expand_functions(expression: sympy.Expr) -> sympy.Expr:
    opened = sympy.expand_log(sympy.expand_func(expression.rewrite(sympy.gamma)))
    return sympy.gammasimp(sympy.expand_trig(opened))


def main() -> None:
    """Answers questions until standard input closes."""
    limit = int(sys.argv[1]) * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    x = sympy.Symbol("x", positive=True)
    is_zero(sympy.sin(2 * x) - 2 * sympy.sin(x) * sympy.cos(x))  # loads what simplification imports lazily
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        left, right = json.loads(line)
        try:
            reply: dict[str, Any] = {"equal": is_zero(build(left) - build(right))}
        except MemoryError:
            reply = {"error": "out of memory"}
        except Exception as error:  # noqa: BLE001 (the worker boundary: reported, and counted by the parent)
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
