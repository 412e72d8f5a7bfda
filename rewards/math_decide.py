"""Whether an answer is the gold, by the gold's type: choices, words, units, lists, points, sets, relations, matrices."""

from __future__ import annotations

from fractions import Fraction

from rewards.math_answer import Reading, is_inequality
from rewards.math_ast import (
    Choice, Fn, Interval, Matrix, Mul, Node, Num, Pow, Quantity, Rel, Seq, SetOp, Sym, Text, add, children, contains, divide,
    integer, multiply, negate, replace_children, symbols,
)  # fmt: skip
from rewards.math_normal import Normalizer, normal_form
from rewards.math_policy import MathPolicy
from rewards.math_polynomial import Polynomial
from rewards.math_scalar import (
    EQUAL_TREES, Outcome, Prover, compare_scalars, different, fold_matrices, rounds_to,
)  # fmt: skip
from rewards.math_sets import compare_sets, is_set_like, real_set

_MAX_ITEMS = 64
_CONSTANTS = frozenset(["pi", "e", "i", "oo"])
_MIN_ROUNDED_DIGITS = 10
_SCALAR = (Num, Sym, Mul, Pow, Fn)


class Decider:
    """One policy and one prover; `decide` compares an answer with a gold."""

    def __init__(self, policy: MathPolicy, prove: Prover) -> None:
        self.policy = policy
        self.prove = prove

    def decide(self, gold: Reading, answer: Reading) -> Outcome:
        """The verdict on two readings, the alternatives of ambiguous notation included."""
        outcome = self.compare(gold.node, answer.node)
        if outcome.truth != "different":
            return outcome
        if gold.text == answer.text and gold.text:
            return Outcome("equal", "same text")
        for kind, node in answer.alternatives:
            if kind == "list" and not (isinstance(gold.node, Seq) and gold.node.kind in ("list", "set")):
                continue
            if kind == "decimal" and not gold.is_decimal:
                continue
            other = self.compare(gold.node, node)
            if other.is_equal:
                return Outcome("equal", f"{kind} reading, {other.stage}")
        for kind, node in gold.alternatives:
            if kind == "unit" and self.compare(node, answer.node).is_equal:
                return Outcome("equal", "unit reading")
        return self._rounded(gold, answer) or outcome

    def _rounded(self, gold: Reading, answer: Reading) -> Outcome | None:
        """A decimal gold: the answer's own rounding of its exact part to it; or all of ten digits and more."""
        if not gold.is_decimal or not isinstance(gold.node, Num):
            return None
        places = len(gold.text.partition(".")[2])
        _, exact = _label(answer.node)
        if answer.rounded == gold.node and rounds_to(exact, gold.node.value, places):
            return Outcome("equal", "rounded part of the answer")
        digits = len(gold.text.replace(".", "").replace("-", "").lstrip("0"))
        if digits >= _MIN_ROUNDED_DIGITS and not answer.is_decimal and not symbols(exact) - {"pi", "e"}:
            if rounds_to(exact, gold.node.value, places):
                return Outcome("equal", f"the gold is the answer rounded to {digits} digits")
        return None

    def compare(self, gold: Node, answer: Node) -> Outcome:
        """The verdict on two trees."""
        if gold == answer:
            return EQUAL_TREES
        gold, answer = _unwrap(gold), _unwrap(answer)
        if gold == answer:
            return EQUAL_TREES
        if isinstance(gold, Choice | Text) or isinstance(answer, Choice | Text):
            outcome = self._words(gold, answer)
            if outcome is not None:
                return outcome
        if isinstance(gold, Rel) or isinstance(answer, Rel):
            outcome = self._relations(gold, answer)
            if outcome is not None:
                return outcome
        gold, answer = _expand_signs(gold), _expand_signs(answer)
        if isinstance(gold, Seq) and gold.kind == "list" or isinstance(answer, Seq) and answer.kind == "list":
            gold, answer = _share_label(gold), _share_label(answer)
        if isinstance(gold, Quantity) or isinstance(answer, Quantity):
            return self._quantities(gold, answer)
        if is_set_like(gold) or is_set_like(answer):
            outcome = self._sets(gold, answer)
            if outcome is not None:
                return outcome
        gold, answer = fold_matrices(gold), fold_matrices(answer)
        if isinstance(gold, Matrix) or isinstance(answer, Matrix):
            return self._matrices(gold, answer)
        if isinstance(gold, Seq) or isinstance(answer, Seq):
            return self._sequences(gold, answer)
        if any(isinstance(n, Rel | SetOp | Interval | Choice | Text) for n in (gold, answer)):
            return different("of different kinds")
        return self._based(gold, answer)

    # Words and choices

    def _words(self, gold: Node, answer: Node) -> Outcome | None:
        one, two = _letter(gold), _letter(answer)
        if isinstance(gold, Choice):
            if one == two:
                if isinstance(answer, Choice) and gold.text is not None and answer.text is not None:
                    return self.compare(gold.text, answer.text)
                return Outcome("equal", "choice")
            if two is None and gold.text is not None and not isinstance(answer, Choice):
                return self.compare(gold.text, answer)
            return different("choice")
        if isinstance(answer, Choice):
            if one is not None and one == two:
                return Outcome("equal", "choice")
            if one is None and answer.text is not None:
                return self.compare(gold, answer.text)
            return different("choice")
        if isinstance(gold, Text) and isinstance(answer, Text):
            same = gold.words == answer.words
            return Outcome("equal", "words") if same else different("words")
        words, other = (gold, answer) if isinstance(gold, Text) else (answer, gold)
        assert isinstance(words, Text)
        if words.words in _NUMBER_WORDS and isinstance(other, Num):
            return (
                Outcome("equal", "number word")
                if other.value == _NUMBER_WORDS[words.words]
                else different("number word")
            )
        if words.words in _EMPTY_WORDS and other == Seq("set", ()):
            return Outcome("equal", "empty set")
        return different("words and mathematics") if not isinstance(other, Rel | Quantity) else None

    # Quantities

    def _quantities(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(gold, Quantity) and isinstance(answer, Quantity):
            if gold.unit != answer.unit and not _is_bare_unit(answer.unit) and not _is_bare_unit(gold.unit):
                return different(f"unit {answer.unit} for {gold.unit}")
            return self.compare(gold.value, answer.value)
        if isinstance(gold, Quantity):
            if gold.unit == "%":
                as_fraction = self.compare(_percent(gold.value), answer)
                if as_fraction.is_equal or not self.policy.percent_may_drop_sign:
                    return as_fraction
            elif not self.policy.unit_may_be_missing:
                return different(f"no unit for {gold.unit}")
            return self.compare(gold.value, answer)
        assert isinstance(answer, Quantity)
        if isinstance(gold, Seq | SetOp | Interval | Matrix) and not isinstance(answer.value, type(gold)):
            return different("of different kinds")
        if answer.unit == "%":
            as_fraction = self.compare(gold, _percent(answer.value))
            if as_fraction.is_equal or not self.policy.percent_may_drop_sign:
                return as_fraction
        return self.compare(gold, answer.value)

    # Relations

    def _relations(self, gold: Node, answer: Node) -> Outcome | None:
        """Equations by their values or as multiples of each other; inequalities as sets or multiples. None: go on as sets."""
        gold_label, gold_value = _label(gold)
        label, value = _label(answer)
        if isinstance(gold, Rel) and isinstance(answer, Rel):
            if gold_label is not None and label is not None:
                if _same_name(gold_label, label):
                    return self.compare(gold_value, value)
                if isinstance(gold_label, Seq) or isinstance(label, Seq):
                    return different("another variable")
            if _is_equation(gold) and _is_equation(answer):
                return self._equations(gold, answer)
            if gold.ops == answer.ops and not is_inequality(gold):
                outcomes = [self.compare(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)]
                return _all_of(outcomes)
            if is_inequality(gold) and is_inequality(answer):
                return self._inequalities(gold, answer)
            return None if is_set_like(gold) or is_set_like(answer) else different("other relations")
        if gold_label is not None:
            if isinstance(gold_label, Seq) and isinstance(answer, Seq) and isinstance(gold_value, Seq):
                return self._named_values(gold_label, gold_value, answer)
            return self.compare(gold_value, answer)
        if label is not None:
            return self.compare(gold, value)
        if (
            isinstance(answer, Rel)
            and _is_equation(answer)
            and not isinstance(gold, Seq)
            and not symbols(gold) - _CONSTANTS
        ):
            # "m + n = 7" for 7: a sum of names and its value.
            left, right = answer.parts[0], answer.parts[-1]
            if _names_a_result(left) and not symbols(right) - _CONSTANTS and right != integer(0):
                return self.compare(gold, right)
        return None if is_set_like(gold) or is_set_like(answer) else different("a relation and a value")

    def _named_values(self, names: Seq, values: Seq, answer: Seq) -> Outcome:
        pairs = [_label(item) for item in answer.items]
        if all(name is not None for name, _ in pairs):
            by_name = {name: value for name, value in pairs}
            if set(by_name) == set(names.items) and len(values.items) == len(names.items):
                return _all_of([self.compare(v, by_name[n]) for n, v in zip(names.items, values.items, strict=True)])
        return self.compare(values, answer)

    def _equations(self, gold: Rel, answer: Rel) -> Outcome:
        if len(gold.parts) > 2 or len(answer.parts) > 2:
            return (
                _all_of([self.compare(g, a) for g, a in zip(gold.parts, answer.parts, strict=False)])
                if len(gold.parts) == len(answer.parts)
                else different("chains of different length")
            )
        ratio = _ratio(gold, answer)
        return Outcome("equal", "multiples") if ratio else different("no multiples of each other")

    def _inequalities(self, gold: Rel, answer: Rel) -> Outcome | None:
        one, two = real_set(gold), real_set(answer)
        if one is not None and two is not None:
            return compare_sets(one, two, self.prove)
        if len(gold.ops) != len(answer.ops):
            return different("chains of different length")
        if len(gold.ops) > 1:
            gold, answer = _ascending(gold), _ascending(answer)
            if gold.ops != answer.ops:
                return different("other relations")
            return _all_of([self.compare(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)])
        gold, answer = _ascending(gold), _ascending(answer)
        if gold.ops != answer.ops:
            return different("other relations")
        ratio = _ratio(gold, answer)
        is_same = ratio is not None and (ratio > 0 or gold.ops == ("!=",))
        return Outcome("equal", "multiples") if is_same else different("no multiples of each other")

    # Sets, points, lists, matrices

    def _sets(self, gold: Node, answer: Node) -> Outcome | None:
        if any(isinstance(n, Seq) and n.kind == "list" for n in (gold, answer)):
            return different("a list and a set of intervals")
        one, two = real_set(gold), real_set(answer)
        if one is None or two is None:
            if isinstance(gold, SetOp) and isinstance(answer, SetOp) and gold.op == answer.op:
                return self._unordered(gold.parts, answer.parts)
            if type(gold) is type(answer) and isinstance(gold, Interval):
                return None
            return different("no set of reals")
        return compare_sets(one, two, self.prove)

    def _sequences(self, gold: Node, answer: Node) -> Outcome:
        if not isinstance(gold, Seq):
            return different("several values where one is asked")
        if not isinstance(answer, Seq):
            if gold.kind == "ratio" and len(gold.items) == 2 and not _looks_like_time(gold):
                return self.compare(divide(gold.items[0], gold.items[1]), answer)
            return different("one value where several are asked")
        if gold.kind == "ratio" or answer.kind == "ratio":
            return self._ratios(gold, answer)
        names = [_label(item)[0] for item in answer.items]
        if (
            len({n for n in names if n is not None}) == len(names) > 1 and _label(gold.items[0])[0] is None
            if gold.items
            else False
        ):
            answer = Seq(answer.kind, tuple(_label(item)[1] for item in answer.items))
        if gold.kind in ("tuple", "bracket"):
            long = len(gold.items) >= 3
            ordered = {"tuple": {"tuple", "list"}, "bracket": {"bracket"}}[gold.kind] | (
                {"tuple", "bracket", "list"} if long else set()
            )
            if answer.kind not in ordered:
                return different(f"a {answer.kind} for a {gold.kind}")
            return self._ordered(gold.items, answer.items)
        if answer.kind not in ("set", "list"):
            return different(f"a {answer.kind} for a {gold.kind}")
        if gold.kind == answer.kind == "set":
            return self._unordered(self._distinct(gold.items), self._distinct(answer.items))
        return self._unordered(gold.items, answer.items)

    def _distinct(self, items: tuple[Node, ...]) -> tuple[Node, ...]:
        kept: list[Node] = []
        for item in items:
            if len(kept) > _MAX_ITEMS or not any(self.compare(k, item).is_equal for k in kept):
                kept.append(item)
        return tuple(kept)

    def _ordered(self, gold: tuple[Node, ...], answer: tuple[Node, ...]) -> Outcome:
        if len(gold) != len(answer):
            return different("another number of values")
        return _all_of([self.compare(g, a) for g, a in zip(gold, answer, strict=True)])

    def _unordered(self, gold: tuple[Node, ...], answer: tuple[Node, ...]) -> Outcome:
        """A matching of equals; equality is an equivalence, so the first match of each will do."""
        if len(gold) != len(answer):
            return different("another number of values")
        if len(gold) > _MAX_ITEMS:
            return EQUAL_TREES if gold == answer else different("too many values to match")
        left = list(answer)
        worst: Outcome | None = None
        stages: list[Outcome] = []
        for item in gold:
            for i, candidate in enumerate(left):
                outcome = self.compare(item, candidate)
                if outcome.is_equal:
                    stages.append(outcome)
                    del left[i]
                    break
                if outcome.truth in ("timeout", "error"):
                    worst = outcome
            else:
                return worst or different("a value without its match")
        return _all_of(stages)

    def _ratios(self, gold: Seq, answer: Seq) -> Outcome:
        if gold.kind != answer.kind or len(gold.items) != len(answer.items):
            return different("another ratio")
        exact = self._ordered(gold.items, answer.items)
        values = [[i.value for i in s.items if isinstance(i, Num)] for s in (gold, answer)]
        if exact.is_equal or _looks_like_time(gold) or any(len(v) != len(gold.items) or 0 in v for v in values):
            return exact
        factor = values[0][0] / values[1][0]
        same = all(g == a * factor for g, a in zip(*values, strict=True))
        return Outcome("equal", "proportional") if same else different("another ratio")

    def _matrices(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(gold, Matrix) and isinstance(answer, Matrix):
            if (len(gold.rows), len(gold.rows[0])) != (len(answer.rows), len(answer.rows[0])):
                return different("another shape")
            return self._ordered(children(gold), children(answer))
        matrix, other = (gold, answer) if isinstance(gold, Matrix) else (answer, gold)
        assert isinstance(matrix, Matrix)
        if (
            isinstance(other, Seq)
            and other.kind in ("tuple", "bracket")
            and 1 in (len(matrix.rows), len(matrix.rows[0]))
        ):
            items = (children(matrix), other.items) if matrix is gold else (other.items, children(matrix))
            return self._ordered(*items)
        return different("a matrix and something else")

    def _based(self, gold: Node, answer: Node) -> Outcome:
        """Numbers with a base: a gold that has one wants the same; otherwise the value counts."""
        one, two = _base_of(gold), _base_of(answer)
        if one is None and two is None:
            return compare_scalars(gold, answer, self.prove)
        if one is not None and two is None:
            return different("another base")
        if one is not None and two is not None:
            return Outcome("equal", "base") if one == two else different("base")
        assert two is not None
        return compare_scalars(gold, integer(two[0]), self.prove)


_NUMBER_WORDS = {w: Fraction(i) for i, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split())}  # fmt: skip
_EMPTY_WORDS = frozenset(["empty set", "no solution", "no solutions", "no real solutions", "no real solution"])


_REPORTED = frozenset(["abs", "norm", "sin", "cos", "tan", "det", "gcd", "lcm", "max", "min"])


def _letter(node: Node) -> str | None:
    if isinstance(node, Choice):
        return node.letter
    if isinstance(node, Sym) and len(node.name) == 1 and "A" <= node.name <= "J":
        return node.name
    if isinstance(node, Text) and len(node.words) == 1 and "a" <= node.words <= "j":
        return node.words.upper()
    return None


def _unwrap(node: Node) -> Node:
    """A set, list or bracket of one value as the value."""
    while isinstance(node, Seq) and node.kind in ("set", "list", "bracket") and len(node.items) == 1:
        node = node.items[0]
    return node


def _percent(node: Node) -> Node:
    return Num(node.value / 100) if isinstance(node, Num) else multiply(node, Num(Fraction(1, 100)))


def _is_bare_unit(unit: str) -> bool:
    return unit.split("^")[0] == "unit"


def _is_name(node: Node) -> bool:
    if isinstance(node, Sym):
        return node.name not in _CONSTANTS
    if isinstance(node, Fn):
        return node.name.startswith(("call:", "accent:")) or node.name == "det"
    return isinstance(node, Text) or (
        isinstance(node, Seq) and node.kind == "tuple" and all(_is_name(i) for i in node.items)
    )


def _is_equation(node: Rel) -> bool:
    return all(op == "=" for op in node.ops)


def _label(node: Node) -> tuple[Node | None, Node]:
    """`x = 3` as (x, 3), `x = 1 + 2 = 3` too, `S = {1}` and `x in [0, 1]`; what is no such definition as (None, itself)."""
    if not isinstance(node, Rel):
        return None, node
    if node.ops == ("in",) and _is_name(node.parts[0]):
        return None, node
    if not _is_equation(node):
        return None, node
    first, last = node.parts[0], node.parts[-1]
    if len(node.parts) > 2 and all(isinstance(part, Sym) for part in node.parts[:-1]):
        # "a = b = c = 0" speaks of all three.
        return None, node
    if _is_name(first):
        return first, last
    if len(node.parts) == 2 and _is_name(last) and not isinstance(last, Text):
        return last, first
    if not any(symbols(p) - _CONSTANTS for p in node.parts):
        return Text(""), last
    return None, node


def _same_name(one: Node, two: Node) -> bool:
    """The same name, or y and f(x), or words on one side."""
    if one == two or isinstance(one, Text) or isinstance(two, Text):
        return True
    calls = [n for n in (one, two) if isinstance(n, Fn)]
    return bool(len(calls) == 1 and Sym("y") in (one, two))


def _share_label(node: Node) -> Node:
    """`x = 1, 2, 3` and `x = 5 or x = -5` as bare lists: one name for all values."""
    if not isinstance(node, Seq) or node.kind != "list":
        return node
    pairs = [_label(item) for item in node.items]
    names = {name for name, _ in pairs if name is not None}
    if len(names) != 1 or pairs[0][0] is None:
        return node
    items: list[Node] = []
    for _, value in pairs:
        value = _expand_signs(value)
        items.extend(value.items if isinstance(value, Seq) and value.kind == "list" else (value,))
    return Seq("list", tuple(items))


def _names_a_result(node: Node) -> bool:
    """m + n, a + b + c, |z|, AB, angle ABC, sin A: quantities whose value is reported."""
    if isinstance(node, Fn):
        return node.name in _REPORTED and bool(symbols(node))
    if isinstance(node, Mul):
        return all(
            isinstance(f, Sym) and (f.name[0].isupper() or f.name in ("angle", "triangle")) for f in node.factors
        )
    terms = children(node) if type(node).__name__ == "Add" else ()
    return bool(terms) and all(isinstance(t, Sym) and t.name not in _CONSTANTS for t in terms)


def _expand_signs(node: Node) -> Node:
    """± as two values: a list, inside a list or a set too. With a ∓ all signs go together, without one each for itself."""
    if not _has_sign(node):
        return node
    if isinstance(node, Seq) and node.kind in ("list", "set"):
        items: list[Node] = []
        for item in node.items:
            expanded = _expand_signs(item)
            items.extend(expanded.items if isinstance(expanded, Seq) and expanded.kind == "list" else (expanded,))
        return Seq(node.kind, tuple(items))
    if isinstance(node, Quantity):
        inner = _expand_signs(node.value)
        return Seq("list", tuple(Quantity(i, node.unit) for i in inner.items)) if isinstance(inner, Seq) else node
    together = contains_minus_plus(node)
    variants = [node]
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


def _ascending(relation: Rel) -> Rel:
    """Written with < and <=."""
    if all(op in (">", ">=") for op in relation.ops):
        flipped = tuple({">": "<", ">=": "<="}[op] for op in reversed(relation.ops))
        return Rel(flipped, tuple(reversed(relation.parts)))
    return relation


def _ratio(one: Rel, two: Rel) -> Fraction | None:
    """c if (left - right) of the one is c times that of the other, by normal forms; None if there is none or it is 0."""
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


def _all_of(outcomes: list[Outcome]) -> Outcome:
    """Equal if all are; different if one is; otherwise what kept it open."""
    for truth in ("different", "error", "timeout"):
        for outcome in outcomes:
            if outcome.truth == truth:
                return outcome
    return outcomes[-1] if outcomes else EQUAL_TREES


def _base_of(node: Node) -> tuple[int, int] | None:
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
        inner = _base_of(node.factors[1])
        return None if inner is None else (-inner[0], inner[1])
    return None


def _looks_like_time(node: Seq) -> bool:
    values = [i.value for i in node.items if isinstance(i, Num)]
    return len(values) == len(node.items) == 2 and values[0] < 24 and 10 <= values[1] < 60 or Fraction(0) in values
