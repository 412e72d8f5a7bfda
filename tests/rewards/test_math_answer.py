"""What the tokenizer and the parser make of notation."""

from fractions import Fraction

import pytest

from rewards.latex import fold_unicode, read_braced, tokenize
from rewards.math_answer import read_answer
from rewards.math_ast import (
    Choice,
    Fn,
    Interval,
    Matrix,
    Num,
    Pow,
    Quantity,
    Rel,
    Seq,
    SetOp,
    Sym,
    Text,
    integer,
    render,
)
from rewards.math_wrappers import strip_wrappers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000,000", Fraction(10**6)), ("1{,}000", Fraction(1000)), (r"1\,000", Fraction(1000)), ("1 000",
        Fraction(1000)),
        ("1,000.99", Fraction(100099, 100)), (".5", Fraction(1, 2)), (r"\frac12", Fraction(1, 2)), ("2 1/3",
        Fraction(7, 3)),
        (r"2\frac{1}{3}", Fraction(7, 3)), ("-4 4/9", Fraction(-40, 9)), (r"0.\overline{3}", Fraction(1, 3)),
        (r"0.1\overline{6}", Fraction(1, 6)), ("0.333...", Fraction(1, 3)), ("1.5e-3", Fraction(3, 2000)), ("½",
        Fraction(1, 2)),
        ("−７", Fraction(-7)), ("3½", Fraction(7, 2)),
    ],
)  # fmt: skip
def test_numbers_are_exact(text, value):
    assert read_answer(text).node == Num(value)


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("x²", Pow(Sym("x"), integer(2))),
        ("45\\%", Quantity(integer(45), "%")),
        ("90^\\circ", Quantity(integer(90), "deg")),
        (r"15\text{ square centimeters}", Quantity(integer(15), "cm^2")),
        ("$5$ dollars", Quantity(integer(5), "$")),
        ("60 km/h", Quantity(integer(60), "km/h")),
        ("(1,2)", Seq("tuple", (integer(1), integer(2)))),
        ("1, 2", Seq("list", (integer(1), integer(2)))),
        (r"\{1,2\}", Seq("set", (integer(1), integer(2)))),
        ("[1,2)", Interval(integer(1), integer(2), True, False)),
        (r"[1,2)\cup(3,4]", SetOp("union", (Interval(integer(1), integer(2), True, False), Interval(integer(3),
        integer(4), False, True)))),
        ("1:4", Seq("ratio", (integer(1), integer(4)))),
        ("x \\ge 3", Rel((">=",), (Sym("x"), integer(3)))),
        ("x=5\\text{ or }x=-5", Seq("list", (Rel(("=",), (Sym("x"), integer(5))), Rel(("=",), (Sym("x"),
        integer(-5)))))),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", Matrix(((integer(1),), (integer(2),)))),
        (r"\textbf{(C)} 12", Choice("C", integer(12))),
        ("204_5", Fn("based", (integer(204), integer(5)))),
        ("Yes", Text("yes")),
        (r"\text{odd}", Text("odd")),
        (r"\emptyset", Seq("set", ())),
        (r"\sin^2 x", Pow(Fn("sin", (Sym("x"),)), integer(2))),
        (r"\log_2 8", Fn("log", (integer(8), integer(2)))),
        (r"\text{E}", Sym("E")),
    ],
)  # fmt: skip
def test_notation_reads_as(text, tree):
    assert read_answer(text).node == tree


@pytest.mark.parametrize(
    "text", ["4 0/0", "11 7/6", "5 6", "2 3 x", "5/", "(5", "5)", r"\frac{1}", "1..2", "x^{2}^3", r"\foo{3}"]
)
def test_what_is_no_notation_stays_words(text):
    assert isinstance(read_answer(text).node, Text)


def test_a_comma_in_brackets_separates_unless_others_are_spaced():
    assert read_answer("(1,234)").node == Seq("tuple", (integer(1), integer(234)))
    assert read_answer("(1,000, 2,000)").node == Seq("tuple", (integer(1000), integer(2000)))
    assert read_answer("32, 349").node == Seq("list", (integer(32), integer(349)))


def test_hidden_characters_do_not_join_numbers():
    for hidden in ("\x00", "\u200b", "\u202e", "\ufeff"):
        assert isinstance(read_answer(f"4{hidden}2").node, Text)


def test_exact_and_rounded_are_told_apart():
    reading = read_answer(r"\frac13 \approx 0.333")
    assert (reading.node, reading.rounded) == (Num(Fraction(1, 3)), Num(Fraction(333, 1000)))
    assert read_answer(r"x \approx 3").node == Rel(("=",), (Sym("x"), integer(3)))


def test_bounds():
    assert isinstance(read_answer("(" * 100 + "1" + ")" * 100).node, Text)
    assert isinstance(read_answer("5" + "!" * 500).node, Text)
    assert isinstance(read_answer("7" * 3000).node, Text)
    assert isinstance(read_answer("x+" * 3000).node, Text)


def test_wrappers():
    assert strip_wrappers(r"\(\frac{1}{3}.\)") == r"\frac{1}{3}"
    assert strip_wrappers("**42**.") == "42"
    assert strip_wrappers("$1, 2, ...$") == "1, 2, ..."
    assert read_braced(r"{a{b}\}c}d", 0) == 9
    assert read_braced("{a", 0) == -1
    assert fold_unicode("x₁²") == "x_{1}^{2}"
    assert [t.value for t in tokenize("2Ax")] == ["2", "A", "x"]


def test_rendering_is_cut():
    assert len(render(read_answer("+".join(f"x_{i}" for i in range(300))).node, limit=50)) == 50
