"""Forms an answer may be written in, brought to one: labels (`x = 3`), ±, sets of one value, bases, multiples of
equations."""

from __future__ import annotations

from fractions import Fraction

from rewards.math_ast import (
    Choice,
    Fn,
    Mul,
    Node,
    Num,
    Quantity,
    Rel,
    Seq,
    Sym,
    Text,
    add,
    children,
    multiply,
    negate,
    replace_children,
    symbols,
)
from rewards.math_normal import Normalizer, normal_form
from rewards.math_polynomial import Polynomial

CONSTANTS = frozenset(["pi", "e", "i", "oo"])
NUMBER_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10,
    "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17,
    "eighteen": 18, "nineteen": 19, "twenty": 20,
}  # fmt: skip
REAL_WORDS = frozenset(["all real numbers", "all reals", "real numbers", "all real number"])
EMPTY_WORDS = frozenset(["empty set", "no solution", "no solutions", "no real solutions", "no real solution"])


_REPORTED = frozenset(["abs", "norm", "sin", "cos", "tan", "det", "gcd", "lcm", "max", "min"])


def choice_letter(node: Node) -> str | None:
    if isinstance(node, Choice):
        return node.letter
    if isinstance(node, Sym) and len(node.name) == 1 and "A" <= node.name <= "J":
        return node.name
    if isinstance(node, Text) and len(node.words) == 1 and "a" <= node.words <= "j":
        return node.words.upper()
    return None


def unwrap(node: Node) -> Node:
    """A set, list or bracket of one value as the value."""
    if isinstance(node, Text) and node.words in REAL_WORDS:
        return Sym("bb_R")
    while isinstance(node, Seq) and node.kind in ("set", "list", "bracket") and len(node.items) == 1:
        node = node.items[0]
    return node


def hundredth(node: Node) -> Node:
    return Num(node.value / 100) if isinstance(node, Num) else multiply(node, Num(Fraction(1, 100)))


def is_bare_unit(unit: str) -> bool:
    return unit.split("^")[0] == "unit"


def _is_name(node: Node) -> bool:
    if isinstance(node, Sym):
        return node.name not in CONSTANTS
    if isinstance(node, Fn):
        return node.name.startswith(("call:", "accent:")) or node.name == "det"
    if isinstance(node, Mul):
        # dy/dx
        return all(n[0] == "d" and len(n) > 1 for n in symbols(node)) and bool(symbols(node))
    return isinstance(node, Text) or (
        isinstance(node, Seq) and node.kind == "tuple" and all(_is_name(i) for i in node.items)
    )


def is_equation(node: Rel) -> bool:
    return all(op == "=" for op in node.ops)


def split_label(node: Node) -> tuple[Node | None, Node]:
    """`x = 3` as (x, 3), `x = 1 + 2 = 3` too, `S = {1}` and `x in [0, 1]`; what is no such definition as (None,
    itself)."""
    if not isinstance(node, Rel):
        return None, node
    if (
        node.ops == ("in",)
        and _is_name(node.parts[0])
        and isinstance(node.parts[1], Seq)
        and node.parts[1].kind == "set"
    ):
        return node.parts[0], node.parts[1]
    if not is_equation(node):
        return None, node
    first, last = node.parts[0], node.parts[-1]
    if len(node.parts) > 2 and all(isinstance(part, Sym) for part in node.parts[:-1]):
        # "a = b = c = 0" speaks of all three.
        return None, node
    if _is_name(first):
        return first, last
    if len(node.parts) == 2 and _is_name(last) and not isinstance(last, Text):
        return last, first
    if not any(symbols(p) - CONSTANTS for p in node.parts):
        return Text(""), last
    return None, node


def is_same_name(one: Node, two: Node) -> bool:
    """The same name, or y and f(x), or words on one side."""
    if one == two or isinstance(one, Text) or isinstance(two, Text):
        return True
    calls = [n for n in (one, two) if isinstance(n, Fn)]
    return bool(len(calls) == 1 and Sym("y") in (one, two))


def share_label(node: Node) -> Node:
    """`x = 1, 2, 3` and `x = 5 or x = -5` as bare lists: one name for all values."""
    if not isinstance(node, Seq) or node.kind != "list":
        return node
    pairs = [split_label(item) for item in node.items]
    names = {name for name, _ in pairs if name is not None}
    if len(names) != 1 or pairs[0][0] is None:
        return node
    items: list[Node] = []
    for _, value in pairs:
        value = expand_signs(value)
        items.extend(value.items if isinstance(value, Seq) and value.kind == "list" else (value,))
    return Seq("list", tuple(items))


def names_a_result(node: Node) -> bool:
    """m + n, a + b + c, |z|, AB, angle ABC, sin A: quantities whose value is reported."""
    if isinstance(node, Fn):
        return node.name in _REPORTED and bool(symbols(node))
    if isinstance(node, Mul):
        return all(
            isinstance(f, Sym) and (f.name[0].isupper() or f.name in ("angle", "triangle")) for f in node.factors
        )
    terms = children(node) if type(node).__name__ == "Add" else ()
    return bool(terms) and all(isinstance(t, Sym) and t.name not in CONSTANTS for t in terms)


def expand_signs(node: Node) -> Node:
    """± as two values: a list, inside a list or a set too. With a ∓ all signs go together, without one each for
    itself."""
    if not _has_sign(node):
        return node
    if isinstance(node, Seq) and node.kind in ("list", "set"):
        items: list[Node] = []
        for item in node.items:
            expanded = expand_signs(item)
            items.extend(expanded.items if isinstance(expanded, Seq) and expanded.kind == "list" else (expanded,))
        return Seq(node.kind, tuple(items))
    if isinstance(node, Quantity):
        inner = expand_signs(node.value)
        return Seq("list", tuple(Quantity(i, node.unit) for i in inner.items)) if isinstance(inner, Seq) else node
    together = contains_minus_plus(node)
    variants: list[Node] = [node]
    for _ in range(1 if together else 3):
        variants = [v for variant in variants for v in _both_signs(variant, together=together)]
        if not any(_has_sign(v) for v in variants):
            break
    return Seq("list", tuple(variants)) if not any(_has_sign(v) for v in variants) else node


def _has_sign(node: Node) -> bool:
    return (isinstance(node, Fn) and node.name in ("pm", "mp")) or any(_has_sign(c) for c in children(node))


def contains_minus_plus(node: Node) -> bool:
    """Whether a ∓ stands in the tree."""
    return (isinstance(node, Fn) and node.name == "mp") or any(contains_minus_plus(c) for c in children(node))


def _both_signs(node: Node, *, together: bool) -> list[Node]:
    """The tree with its first ± (or all of them) read as + and as -."""
    if not _has_sign(node):
        return [node]
    return [_with_sign(node, sign, [together])[0] for sign in (1, -1)]


def _with_sign(node: Node, sign: int, state: list[bool]) -> tuple[Node, bool]:
    if isinstance(node, Fn) and node.name in ("pm", "mp"):
        chosen = sign if node.name == "pm" else -sign
        args = list(node.args)
        if state[0]:
            args = [_with_sign(a, sign, state)[0] for a in args]
        last = args[-1] if chosen > 0 else negate(args[-1])
        return (add(args[0], last) if len(args) == 2 else last), True
    below = list(children(node))
    for i, child in enumerate(below):
        if _has_sign(child):
            below[i], _ = _with_sign(child, sign, state)
            if not state[0]:
                break
    return (replace_children(node, tuple(below)) if below else node), True


def ascending(relation: Rel) -> Rel:
    """Written with < and <=."""
    if all(op in (">", ">=") for op in relation.ops):
        flipped = tuple({">": "<", ">=": "<="}[op] for op in reversed(relation.ops))
        return Rel(flipped, tuple(reversed(relation.parts)))
    return relation


def constant_ratio(one: Rel, two: Rel) -> Fraction | None:
    """c if (left - right) of the one is c times that of the other, by normal forms; None if there is none or it is
    0."""
    try:
        forms = [normal_form(add(r.parts[0], negate(r.parts[1]))) for r in (one, two)]
    except TypeError:
        return None
    if forms[0] is None or forms[1] is None:
        return None
    rules = Normalizer({**forms[0].bases, **forms[1].bases})
    try:
        first: Polynomial = rules.product(forms[0].numerator, forms[1].denominator)
        second: Polynomial = rules.product(forms[1].numerator, forms[0].denominator)
    except ArithmeticError:
        return None
    if not first or set(first) != set(second):
        return None
    ratios = {first[m] / second[m] for m in first}
    return ratios.pop() if len(ratios) == 1 else None


def read_base(node: Node) -> tuple[int, int] | None:
    """(value, base) of a number with a base subscript."""
    if isinstance(node, Fn) and node.name == "based":
        digits, base = node.args
        if (
            isinstance(digits, Num)
            and isinstance(base, Num)
            and digits.value.denominator == 1 == base.value.denominator
        ):
            text, radix = str(digits.value), int(base.value)
            if 2 <= radix <= 36 and all(int(c, 36) < radix for c in text.lstrip("-")):
                return int(text, radix), radix
    if isinstance(node, Mul) and len(node.factors) == 2 and node.factors[0] == Num(Fraction(-1)):
        inner = read_base(node.factors[1])
        return None if inner is None else (-inner[0], inner[1])
    return None


def looks_like_time(node: Seq) -> bool:
    values = [i.value for i in node.items if isinstance(i, Num)]
    return (len(values) == len(node.items) == 2 and values[0] < 24 and 10 <= values[1] < 60) or Fraction(0) in values
