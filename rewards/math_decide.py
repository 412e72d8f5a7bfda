"""Whether an answer is the gold, by the gold's type: choices, words, units, lists, points, sets, relations,
matrices."""

from __future__ import annotations

from rewards.math_answer import Reading, is_inequality
from rewards.math_ast import (
    Choice,
    Fn,
    Interval,
    Matrix,
    Mul,
    Node,
    Num,
    Pow,
    Quantity,
    Rel,
    Seq,
    SetOp,
    Sym,
    Text,
    children,
    divide,
    integer,
    symbols,
)  # fmt: skip
from rewards.math_forms import (
    CONSTANTS,
    EMPTY_WORDS,
    NUMBER_WORDS,
    ascending,
    choice_letter,
    constant_ratio,
    expand_signs,
    hundredth,
    is_bare_unit,
    is_equation,
    is_same_name,
    looks_like_time,
    names_a_result,
    read_base,
    share_label,
    split_label,
    unwrap,
)
from rewards.math_policy import MathPolicy
from rewards.math_scalar import (
    EQUAL_TREES,
    Outcome,
    Prover,
    all_of,
    compare_scalars,
    different,
    fold_matrices,
    rounds_to,
)  # fmt: skip
from rewards.math_sets import compare_sets, is_set_like, real_set

_MAX_ITEMS = 64
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
        _, exact = split_label(answer.node)
        if answer.rounded == gold.node and rounds_to(exact, gold.node.value, places):
            return Outcome("equal", "rounded part of the answer")
        digits = len(gold.text.replace(".", "").replace("-", "").lstrip("0"))
        is_exact = not answer.is_decimal and not symbols(exact) - {"pi", "e"}
        if digits >= _MIN_ROUNDED_DIGITS and is_exact and rounds_to(exact, gold.node.value, places):
            return Outcome("equal", f"the gold is the answer rounded to {digits} digits")
        return None

    def compare(self, gold: Node, answer: Node) -> Outcome:
        """The verdict on two trees."""
        if gold == answer:
            return EQUAL_TREES
        gold, answer = unwrap(gold), unwrap(answer)
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
        gold, answer = expand_signs(gold), expand_signs(answer)
        if (isinstance(gold, Seq) and gold.kind == "list") or (isinstance(answer, Seq) and answer.kind == "list"):
            gold, answer = share_label(gold), share_label(answer)
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
        one, two = choice_letter(gold), choice_letter(answer)
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
        if words.words in NUMBER_WORDS and isinstance(other, Num):
            return (
                Outcome("equal", "number word")
                if other.value == NUMBER_WORDS[words.words]
                else different("number word")
            )
        if words.words in EMPTY_WORDS and other == Seq("set", ()):
            return Outcome("equal", "empty set")
        return different("words and mathematics") if not isinstance(other, Rel | Quantity) else None

    # Quantities

    def _quantities(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(gold, Quantity) and isinstance(answer, Quantity):
            if gold.unit != answer.unit and not is_bare_unit(answer.unit) and not is_bare_unit(gold.unit):
                return different(f"unit {answer.unit} for {gold.unit}")
            return self.compare(gold.value, answer.value)
        if isinstance(gold, Quantity):
            if gold.unit == "%":
                as_fraction = self.compare(hundredth(gold.value), answer)
                if as_fraction.is_equal or not self.policy.percent_may_drop_sign:
                    return as_fraction
            elif not self.policy.unit_may_be_missing:
                return different(f"no unit for {gold.unit}")
            return self.compare(gold.value, answer)
        assert isinstance(answer, Quantity)
        if isinstance(gold, Seq | SetOp | Interval | Matrix) and not isinstance(answer.value, type(gold)):
            return different("of different kinds")
        if answer.unit == "%":
            as_fraction = self.compare(gold, hundredth(answer.value))
            if as_fraction.is_equal or not self.policy.percent_may_drop_sign:
                return as_fraction
        return self.compare(gold, answer.value)

    # Relations

    def _relations(self, gold: Node, answer: Node) -> Outcome | None:
        """Equations by their values or as multiples of each other; inequalities as sets or multiples. None: go on as
        sets."""
        gold_label, gold_value = split_label(gold)
        label, value = split_label(answer)
        if isinstance(gold, Rel) and isinstance(answer, Rel):
            if gold_label is not None and label is not None:
                if is_same_name(gold_label, label):
                    return self.compare(gold_value, value)
                if isinstance(gold_label, Seq) or isinstance(label, Seq):
                    return different("another variable")
            if is_equation(gold) and is_equation(answer):
                return self._equations(gold, answer)
            if gold.ops == answer.ops and not is_inequality(gold):
                outcomes = [self.compare(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)]
                return all_of(outcomes)
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
            and is_equation(answer)
            and not isinstance(gold, Seq)
            and not symbols(gold) - CONSTANTS
        ):
            # "m + n = 7" for 7: a sum of names and its value.
            left, right = answer.parts[0], answer.parts[-1]
            if names_a_result(left) and not symbols(right) - CONSTANTS and right != integer(0):
                return self.compare(gold, right)
        return None if is_set_like(gold) or is_set_like(answer) else different("a relation and a value")

    def _named_values(self, names: Seq, values: Seq, answer: Seq) -> Outcome:
        pairs = [split_label(item) for item in answer.items]
        if all(name is not None for name, _ in pairs):
            by_name = dict(pairs)
            if set(by_name) == set(names.items) and len(values.items) == len(names.items):
                return all_of([self.compare(v, by_name[n]) for n, v in zip(names.items, values.items, strict=True)])
        return self.compare(values, answer)

    def _equations(self, gold: Rel, answer: Rel) -> Outcome:
        if len(gold.parts) > 2 or len(answer.parts) > 2:
            return (
                all_of([self.compare(g, a) for g, a in zip(gold.parts, answer.parts, strict=False)])
                if len(gold.parts) == len(answer.parts)
                else different("chains of different length")
            )
        ratio = constant_ratio(gold, answer)
        return Outcome("equal", "multiples") if ratio else different("no multiples of each other")

    def _inequalities(self, gold: Rel, answer: Rel) -> Outcome | None:
        one, two = real_set(gold), real_set(answer)
        if one is not None and two is not None:
            return compare_sets(one, two, self.prove)
        if len(gold.ops) != len(answer.ops):
            return different("chains of different length")
        if len(gold.ops) > 1:
            gold, answer = ascending(gold), ascending(answer)
            if gold.ops != answer.ops:
                return different("other relations")
            return all_of([self.compare(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)])
        gold, answer = ascending(gold), ascending(answer)
        if gold.ops != answer.ops:
            return different("other relations")
        ratio = constant_ratio(gold, answer)
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
            if gold.kind == "ratio" and len(gold.items) == 2 and not looks_like_time(gold):
                return self.compare(divide(gold.items[0], gold.items[1]), answer)
            return different("one value where several are asked")
        if gold.kind == "ratio" or answer.kind == "ratio":
            return self._ratios(gold, answer)
        names = [split_label(item)[0] for item in answer.items]
        if (
            len({n for n in names if n is not None}) == len(names) > 1 and split_label(gold.items[0])[0] is None
            if gold.items
            else False
        ):
            answer = Seq(answer.kind, tuple(split_label(item)[1] for item in answer.items))
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
        return all_of([self.compare(g, a) for g, a in zip(gold, answer, strict=True)])

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
        return all_of(stages)

    def _ratios(self, gold: Seq, answer: Seq) -> Outcome:
        if gold.kind != answer.kind or len(gold.items) != len(answer.items):
            return different("another ratio")
        exact = self._ordered(gold.items, answer.items)
        values = [[i.value for i in s.items if isinstance(i, Num)] for s in (gold, answer)]
        if exact.is_equal or looks_like_time(gold) or any(len(v) != len(gold.items) or 0 in v for v in values):
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
        one, two = read_base(gold), read_base(answer)
        if one is None and two is None:
            return compare_scalars(gold, answer, self.prove)
        if one is not None and two is None:
            return different("another base")
        if one is not None and two is not None:
            return Outcome("equal", "base") if one == two else different("base")
        assert two is not None
        return compare_scalars(gold, integer(two[0]), self.prove)
